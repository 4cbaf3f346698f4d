"""What a report says: concepts, whether they are asserted, and how alike two reports are."""
