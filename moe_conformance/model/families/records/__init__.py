"""One file a model family. Adding a family is writing one; removing the file removes the family everywhere."""
