from typing import Any

NUM_PARAMETERS: int

def crops(image: Any, parameters: Any, out: Any, /) -> None: ...
