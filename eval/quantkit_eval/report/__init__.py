"""The report: pages, charts and tables."""
