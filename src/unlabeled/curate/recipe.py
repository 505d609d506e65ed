"""The recipe of a curation: every threshold and limit, typed, with its unit and where it comes from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unlabeled.curate.blocks import LEAST_MEMORY, parse_bytes
from unlabeled.pretrain.limits import Limits
from unlabeled.pretrain.recipe import with_fields
from unlabeled.pretrain.recipes import read_values

STEPS = ("quality", "duplicates", "decontaminate", "retrieve", "cluster")  # after collecting, in this order
NO_MODEL = "none"  # as a MODEL: leave out what needs features


@dataclass(frozen=True)
class CollectRecipe:
    """Fetching a list of URLs."""

    connections: int = 32  # at once, over all hosts
    per_host: int = 2  # connections at once to one host
    delay: float = 0.1  # seconds between the starts of two requests to one host
    timeout: float = 30.0  # seconds an image may take in all, redirects included
    max_bytes: int = 20_000_000  # of one image, after decompression
    max_redirects: int = 5  # of one image
    retries: int = 2  # after a timeout, a broken connection, 429 or 5xx
    max_wait: float = 60.0  # seconds; a Retry-After that asks for more is a failure
    allow_private: bool = False  # fetch from private, loopback and link-local addresses
    hosts: tuple[str, ...] = ()  # only these and their subdomains; none: all
    not_hosts: tuple[str, ...] = ()  # not these, nor their subdomains
    honour_noai: bool = True  # leave out what is sent with X-Robots-Tag: noai or noimageai
    urls_per_shard: int = 2048  # URLs of one tar shard


@dataclass(frozen=True)
class QualityRecipe:
    """What an image must be; measured with the short side shrunk to at most 256 pixels, sizes excepted."""

    min_side: int = 32  # pixels of the short side; the paper has no such limit: what CIFAR has
    max_aspect: float = 5.0  # long side over short side
    min_blur: float = 20.0  # variance of the Laplacian of grey levels (Pech-Pacheco et al., 2000)
    min_mean: float = 0.04  # mean luminance, 0 black to 1 white
    max_mean: float = 0.97  # the same
    max_clipped: float = 0.9  # share of pixels within 5 of 255 levels of black or white
    min_entropy: float = 1.5  # bits of the histogram of grey levels, 0 to 8
    max_plain: float = 0.97  # share of pixels in a 3 x 3 neighbourhood within 8 levels: blank
    max_text: float = 0.32  # plain share times the share of hard edges among the rest: text, screens
    max_grain: float = 2.8  # sharpness over that at half the size: 4 in noise, about 1 in photographs
    scorer: str = ""  # module:function of RGB pixels, or a linear head (.npz, .safetensors) on the features
    score: float = 0.5  # of the scorer, which side of it is kept says scorer_keeps
    scorer_keeps: Literal["above", "below"] = "above"  # scores at `score` are kept in both cases


@dataclass(frozen=True)
class FeatureRecipe:
    """The embedding that copies, clusters and neighbours are found with."""

    model: str = "facebook/dinov2-small"  # MODEL; "none": leave out what needs features
    kind: Literal["cls", "mean", "cls+mean"] = "cls"  # of the features
    size: int = 0  # pixels the model sees; 0: its own
    shape: Literal["crop", "keep", "stretch"] = "crop"  # how an image becomes that size


@dataclass(frozen=True)
class DuplicatesRecipe:
    """Copies of one image; one of each group is kept."""

    exact: bool = True  # images of the same bytes
    hash_distance: int = 4  # bits of 64 in which perceptual hashes may differ, 0 to 7; -1: no such step
    precision: float = 0.99  # wanted of the pairs called copies, on copies made of the images themselves
    threshold: float = 0.0  # cosine; 0: by `precision` (DINOv2 with SSCD: 0.6); 2: no such step
    recall: float = 0.99  # of the pairs above the threshold, of the approximate search
    calibration_images: int = 500  # that copies are made of
    # Whiten features before they are compared, here and in decontamination; auto: where copies of the images
    # are then found better. A threshold that is a number is of features as they are, unless this is yes.
    whiten: Literal["auto", "yes", "no"] = "auto"


@dataclass(frozen=True)
class DecontaminateRecipe:
    """Images too near to evaluation sets."""

    threshold: float = (
        0.0  # cosine; 0: that of the duplicates, or by their precision (DINOv2 with SSCD: 0.45)
    )
    recall: float = 0.99  # of the pairs above the threshold


@dataclass(frozen=True)
class ClusterRecipe:
    """Balanced sampling of what is left, from hierarchical k-means (Vo et al. 2024, 2405.15613)."""

    count: int = 0  # images wanted; 0: no such step
    levels: tuple[int, ...] = ()  # clusters of each level, fine to coarse; none: from the number of images
    resampling: int = 1  # rounds at each level
    sampling: Literal["random", "closest"] = "random"  # within the finest clusters


@dataclass(frozen=True)
class RetrieveRecipe:
    """Images like the seeds (DINOv2 appendix A)."""

    method: Literal["auto", "nearest", "clusters"] = "auto"  # auto: clusters for fewer seeds than auto_seeds
    auto_seeds: int = 1_000_000  # seeds from which on their nearest images are taken (DINOv2)
    neighbours: int = 4  # nearest images of each seed (DINOv2; 32 for ImageNet-1k)
    clusters: int = 0  # of the pool; 0: its square root, at most 100,000 (DINOv2: 100,000)
    min_seeds: int = 0  # a cluster that holds more seeds than this matches (DINOv2: 3)
    per_cluster: int = 10_000  # images drawn from each cluster that matches (DINOv2)
    most: int = 1_000_000  # images retrieved in all (DINOv2)


@dataclass(frozen=True)
class RunRecipe:
    """What the work may use."""

    seed: int = 0  # of everything random
    workers: int = 0  # threads; 0: one for each core
    memory: str = "4GB"  # that arrays may take, mapped files excepted
    ray: str = ""  # of a Ray cluster: local (started here), auto or HOST:PORT; none: threads


@dataclass(frozen=True)
class CurateRecipe:
    """Everything a curation is made of; frozen, and saved as recipe.toml."""

    collect: CollectRecipe = field(default_factory=CollectRecipe)
    quality: QualityRecipe = field(default_factory=QualityRecipe)
    features: FeatureRecipe = field(default_factory=FeatureRecipe)
    duplicates: DuplicatesRecipe = field(default_factory=DuplicatesRecipe)
    decontaminate: DecontaminateRecipe = field(default_factory=DecontaminateRecipe)
    cluster: ClusterRecipe = field(default_factory=ClusterRecipe)
    retrieve: RetrieveRecipe = field(default_factory=RetrieveRecipe)
    run: RunRecipe = field(default_factory=RunRecipe)


def resolved(
    recipe: str | Path | CurateRecipe | None, overrides: dict[str, Any], where: str = "the command line"
) -> CurateRecipe:
    """Return a recipe, or that of a TOML file, or the default one, with some fields set.

    overrides: dotted field name ("quality.min_blur") -> value, or its text; None values are left out.
    Raises UserError: unreadable file, unknown field (the near one is suggested), wrong type or range.
    """
    listed = "recipe.toml of any curation lists all fields"
    base = recipe if isinstance(recipe, CurateRecipe) else CurateRecipe()
    if isinstance(recipe, str | Path):
        path = Path(recipe).expanduser()
        base = with_fields(base, read_values(path), str(path), listed)
        check(base, str(path))
    base = with_fields(
        base, {name: value for name, value in overrides.items() if value is not None}, where, listed
    )
    check(base, where)
    return base


def check(recipe: CurateRecipe, where: str) -> None:
    """Refuse what would otherwise fail late or silently. Raises UserError, naming the field and its range."""

    limits = Limits(recipe, where)
    shares = ("min_mean", "max_mean", "max_clipped", "max_plain", "max_text")
    limits.within(0, 1, *(f"quality.{name}" for name in shares), kind="a share")
    limits.within(0, 8, "quality.min_entropy", kind="a number of bits")
    limits.at_least(1, "quality.max_aspect")
    copies = recipe.duplicates
    limits.within(-1, 7, "duplicates.hash_distance", kind="a number of bits, or -1 to leave the step out")
    limits.above(0, "duplicates.precision", "duplicates.recall", "decontaminate.recall")
    limits.within(0, 1, "duplicates.precision", "duplicates.recall", "decontaminate.recall")
    limits.need(
        0 <= copies.threshold <= 1 or copies.threshold == 2,
        "duplicates.threshold",
        "must be a cosine up to 1, 0 to have it calibrated, or 2 to leave the step out",
    )
    limits.at_least(2, "duplicates.calibration_images")
    limits.within(0, 1, "decontaminate.threshold", kind="a cosine, or 0 to have it calibrated")
    counts = ("connections", "per_host", "urls_per_shard", "max_bytes")
    limits.at_least(1, *(f"collect.{name}" for name in counts))
    limits.at_least(0, "collect.delay", "collect.max_redirects", "collect.retries", "collect.max_wait")
    limits.above(0, "collect.timeout")
    levels = recipe.cluster.levels
    limits.need(
        all(k >= 1 for k in levels) and list(levels) == sorted(levels, reverse=True),
        "cluster.levels",
        "must be numbers of clusters from fine to coarse, as 10000,1000,100",
    )
    limits.at_least(0, "cluster.count", "cluster.resampling", "retrieve.clusters", "run.workers")
    limits.at_least(1, "retrieve.neighbours", "retrieve.per_cluster", "retrieve.most")
    least = f"must be {LEAST_MEMORY >> 20}MB at least"
    limits.need(parse_bytes(recipe.run.memory) >= LEAST_MEMORY, "run.memory", least)
