"""Where entries live: the store, the vectors, the words, and the batch job that builds them."""
