"""A study as a page, as pictures, as text and for trackers; asks no model."""
