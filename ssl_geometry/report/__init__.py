"""What is drawn from records: figures and pages."""
