"""What is drawn from records: pictures and pages."""
