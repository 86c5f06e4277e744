"""The quickstart: a small world, the model trained on it, the questions it learns to answer, a picture of that."""
