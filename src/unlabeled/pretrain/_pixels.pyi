from typing import Any

NUM_PARAMETERS: int

def crops(image: Any, height: int, width: int, parameters: Any, out: Any, size: int) -> None: ...
