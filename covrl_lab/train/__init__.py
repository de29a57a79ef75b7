"""Everything that writes runs."""
