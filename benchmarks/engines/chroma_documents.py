"""Runs in Chroma's venv: documents and their vectors into a running server, once. Usage: PORT NPZ."""

from __future__ import annotations

import sys

import chromadb
import numpy as np

found = np.load(sys.argv[2])
client = chromadb.HttpClient(port=int(sys.argv[1]))
collection = client.get_or_create_collection("bench", metadata={"hnsw:space": "ip"})
ids = [str(id) for id in found["ids"]]
for start in range(collection.count(), len(ids), 500):
    part = slice(start, start + 500)
    collection.add(ids=ids[part], embeddings=found["vectors"][part].tolist())
print(collection.id)
