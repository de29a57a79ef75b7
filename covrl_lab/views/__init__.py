"""Everything that reads runs: panels, figures, reports."""
