"""How candidates come about: pure functions of an archive, a task and a random stream."""
