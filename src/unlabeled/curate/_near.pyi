from typing import Any

def near_rows(
    codes: Any,
    inverse: Any,
    queries: Any,
    next: int,
    targets: Any,
    threshold: float,
    slack: float,
    left: Any,
    right: Any,
    is_plain: bool = False,
    /,
) -> tuple[int, int]:
    """Write pairs of places in queries and targets that are near, from query `next` on, while there is room.

    codes: uint8 (N, W), W a multiple of 8. inverse: float32 (N,). queries, targets: int64, rows.
    left, right: int32, for at least two pairs of each target. is_plain: by the code for any processor.
    Returns the number of pairs, and the next query.
    """
