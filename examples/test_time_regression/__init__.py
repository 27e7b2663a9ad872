"""What attention that fits lines gains over attention that fits constants: as estimators, and trained."""
