"""One training step of DINOv2, plain and slow: Python loops over images, views, heads and tokens, in float64.

It shares no code with the package; it is written from the papers and reads parameters by the release's key names.
"""

import math

import torch
from torch import Tensor

Parameters = dict[str, Tensor]
EPS = 1e-6


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean()
    variance = ((x - mean) ** 2).mean()
    return (x - mean) / torch.sqrt(variance + EPS) * weight + bias


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max())
    return e / e.sum()


def backbone(p: Parameters, image: Tensor, mask: Tensor | None, patch: int, depth: int, num_heads: int,
             position: Tensor, prefix: str = "backbone.") -> list[Tensor]:  # fmt: skip
    """Tokens of one normalised image (3, H, W): CLS, registers, patches, each (D,). position: (1 + N, D)."""
    tokens = [p[f"{prefix}cls_token"][0, 0] + position[0]]
    if f"{prefix}register_tokens" in p:
        tokens += list(p[f"{prefix}register_tokens"][0])
    rows, columns = image.shape[1] // patch, image.shape[2] // patch
    for row in range(rows):
        for column in range(columns):
            number = row * columns + column
            window = image[:, row * patch : (row + 1) * patch, column * patch : (column + 1) * patch]
            token = (p[f"{prefix}patch_embed.proj.weight"] * window[None]).sum((1, 2, 3))
            token = token + p[f"{prefix}patch_embed.proj.bias"]
            if mask is not None and bool(mask[number]):
                token = p[f"{prefix}mask_token"][0]
            tokens.append(token + position[1 + number])
    for index in range(depth):
        tokens = block(p, tokens, f"{prefix}blocks.{index}.", num_heads)
    return [layer_norm(token, p[f"{prefix}norm.weight"], p[f"{prefix}norm.bias"]) for token in tokens]


def block(p: Parameters, tokens: list[Tensor], name: str, num_heads: int) -> list[Tensor]:
    width = len(tokens[0])
    size = width // num_heads
    normed = [layer_norm(token, p[f"{name}norm1.weight"], p[f"{name}norm1.bias"]) for token in tokens]
    qkv = [p[f"{name}attn.qkv.weight"] @ token + p[f"{name}attn.qkv.bias"] for token in normed]
    mixed = []
    for one in qkv:
        parts = []
        for head in range(num_heads):
            query = one[head * size : (head + 1) * size]
            keys = [other[width + head * size : width + (head + 1) * size] for other in qkv]
            values = [other[2 * width + head * size : 2 * width + (head + 1) * size] for other in qkv]
            weights = softmax(torch.stack([(query * key).sum() / math.sqrt(size) for key in keys]))
            parts.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
        mixed.append(p[f"{name}attn.proj.weight"] @ torch.cat(parts) + p[f"{name}attn.proj.bias"])
    tokens = [token + p[f"{name}ls1.gamma"] * more for token, more in zip(tokens, mixed, strict=True)]
    result = []
    for token in tokens:
        normed_token = layer_norm(token, p[f"{name}norm2.weight"], p[f"{name}norm2.bias"])
        hidden = gelu(p[f"{name}mlp.fc1.weight"] @ normed_token + p[f"{name}mlp.fc1.bias"])
        more = p[f"{name}mlp.fc2.weight"] @ hidden + p[f"{name}mlp.fc2.bias"]
        result.append(token + p[f"{name}ls2.gamma"] * more)
    return result


def head_logits(p: Parameters, token: Tensor, name: str) -> Tensor:
    for layer in (0, 2, 4):
        token = p[f"{name}mlp.{layer}.weight"] @ token + p[f"{name}mlp.{layer}.bias"]
        if layer < 4:
            token = gelu(token)
    token = token / torch.sqrt((token**2).sum())
    prototypes = p[f"{name}last_layer.weight_v"]
    return torch.stack([(token * row / torch.sqrt((row**2).sum())).sum() for row in prototypes])


def cross_entropy(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    scaled = logits / temperature
    return -(target * (scaled - torch.logsumexp(scaled, 0))).sum()


def sinkhorn(logits: list[Tensor], temperature: float, iterations: int) -> list[Tensor]:
    assignment = torch.exp(torch.stack(logits) / temperature)
    num_samples, num_prototypes = assignment.shape
    for _ in range(iterations):
        for k in range(num_prototypes):
            assignment[:, k] = assignment[:, k] / assignment[:, k].sum() / num_prototypes
        for n in range(num_samples):
            assignment[n] = assignment[n] / assignment[n].sum() / num_samples
    return list(assignment * num_samples)


def centred(logits: list[Tensor], center: Tensor, temperature: float) -> list[Tensor]:
    return [softmax((row - center) / temperature) for row in logits]


def koleo(rows: list[Tensor]) -> Tensor:
    unit = [row / torch.sqrt((row**2).sum()) for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(unit):
        distances = [torch.sqrt(((row - other) ** 2).sum()) for j, other in enumerate(unit) if j != i]
        total = total - torch.log(min(distances, key=lambda value: value.item()) + 1e-8)
    return total / len(unit)


def clipped(gradients: Parameters, names: list[str], highest: float) -> float:
    """Scale the named gradients together to a norm of at most `highest`; the norm before."""
    norm = math.sqrt(sum(float((gradients[name] ** 2).sum()) for name in names))
    if norm > highest:
        for name in names:
            # torch's clipping adds 1e-6 to the norm.
            gradients[name] = gradients[name] * highest / (norm + 1e-6)
    return norm


def rate_of(name: str, depth: int, layer_decay: float, patch_embed_multiplier: float) -> float:
    """What a parameter's learning rate is multiplied by; the embeddings are layer 0, block i is layer i + 1."""
    parts = name.split(".")
    if parts[0] != "backbone" or parts[1] == "norm":
        return 1.0
    layer = int(parts[2]) + 1 if parts[1] == "blocks" else 0
    rate = 1.0
    for _ in range(depth + 1 - layer):
        rate *= layer_decay
    return rate * patch_embed_multiplier if parts[1] == "patch_embed" else rate


def decays(name: str) -> bool:
    """Whether weight decay applies: not to biases, norms and LayerScale."""
    last = name.split(".")[-1]
    return last not in ("bias", "gamma") and "norm" not in name


def adamw(value: Tensor, gradient: Tensor, state: dict[str, Tensor], number: int, rate: float, decay: float,
          betas: tuple[float, float]) -> Tensor:  # fmt: skip
    """The parameter after AdamW's step `number` (1, 2, ...); state keeps both moments (1711.05101)."""
    first = betas[0] * state.get("first", torch.zeros_like(value)) + (1 - betas[0]) * gradient
    second = betas[1] * state.get("second", torch.zeros_like(value)) + (1 - betas[1]) * gradient**2
    state["first"], state["second"] = first, second
    first, second = first / (1 - betas[0] ** number), second / (1 - betas[1] ** number)
    return value - rate * decay * value - rate * first / (torch.sqrt(second) + 1e-8)
