"""Images, batches, and the views that methods make of them."""
