"""What a run folder is and says: files only, no torch."""
