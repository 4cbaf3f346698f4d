"""Runs in Chroma's venv: documents and their vectors into a running server. Usage: PORT NPZ."""

from __future__ import annotations

import sys

import chromadb
import numpy as np

found = np.load(sys.argv[2])
collection = chromadb.HttpClient(port=int(sys.argv[1])).create_collection("bench", metadata={"hnsw:space": "ip"})
ids = [str(id) for id in found["ids"]]
for start in range(0, len(ids), 500):
    part = slice(start, start + 500)
    collection.add(ids=ids[part], embeddings=found["vectors"][part].tolist())
print(collection.id)
