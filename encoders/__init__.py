"""Text and images to unit vectors, and the methods that train them."""
