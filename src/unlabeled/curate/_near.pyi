from typing import Any

def near_rows(
    width: int,
    query_codes: Any,
    queries: Any,
    slope: Any,
    less: Any,
    next: int,
    target_codes: Any,
    targets: Any,
    scale: Any,
    weight: Any,
    left: Any,
    right: Any,
    slower: int = 0,
    /,
) -> tuple[int, int]:
    """Write pairs of places in queries and targets that are near, from query `next` on, while there is room.

    Near are those whose product of integers is at least slope * scale - less * weight, in float32.
    query_codes, target_codes: uint8 (N, width), width a multiple of 8. queries, targets: int64, rows of them.
    slope, less: float32, of each query. scale, weight: float32, of each target. left, right: int32, for at least
    sixteen pairs of each target. slower: 1 for AVX2 at most, 2 for the code for any processor.
    Returns the number of pairs, and the next query.
    """
