"""The whole way on a small model: search, write, serve, ask the server."""
