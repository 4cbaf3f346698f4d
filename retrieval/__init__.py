"""The vocabulary and the pipe: documents -> link -> encode -> index -> search -> fuse -> rerank -> evaluate."""
