"""What proposes curves to evaluate; knows nothing of models and tasks."""
