"""What proposes candidates; knows nothing of models and tasks."""
