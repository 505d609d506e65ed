"""LanceDB on vectors of a file, for benchmarks/search.py; run by a Python that has lancedb and numpy.

python benchmarks/rivals/lancedb_search.py VECTORS.npy QUERIES.npy FOLDER

One JSON line an index: seconds to build, and of each way of asking the rows found and queries/s.
"""

import json
import sys
import time

import lancedb
import numpy as np
import pyarrow as pa

K = 10


def main() -> None:
    vectors, queries = np.load(sys.argv[1]), np.load(sys.argv[2])
    database = lancedb.connect(sys.argv[3])
    values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
    rows = pa.table({"row": np.arange(len(vectors)), "vector": values})
    kinds = {
        "IVF_HNSW_SQ": (
            {"num_partitions": 1, "m": 20, "ef_construction": 150},
            [{"ef": 40}, {"ef": 80}, {"ef": 200}],
        ),
        "IVF_PQ": (
            {"num_partitions": 256, "num_sub_vectors": vectors.shape[1] // 8},
            [{"nprobes": 20, "refine": 3}, {"nprobes": 40, "refine": 5}],
        ),
    }
    for kind, (options, ways) in kinds.items():
        table = database.create_table(kind, rows)
        begun = time.perf_counter()
        table.create_index(metric="cosine", index_type=kind, **options)
        result = {"kind": kind, "seconds": time.perf_counter() - begun, "ways": []}
        for way in ways:
            found, start = [], 0.0
            for number, query in enumerate(queries):
                if number == 20:  # the first warm it up
                    start = time.perf_counter()
                asked = table.search(query).distance_type("cosine").limit(K).select(["row", "_distance"])
                asked = asked.ef(way["ef"]) if "ef" in way else asked.nprobes(way["nprobes"])
                asked = asked.refine_factor(way.get("refine", 1))
                found.append(asked.to_arrow()["row"].to_pylist())
            rate = (len(queries) - 20) / (time.perf_counter() - start)
            result["ways"].append({"way": way, "rate": rate, "rows": found})
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
