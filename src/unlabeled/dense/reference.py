"""Segmentation by reference: each patch of a target is of the class whose patches, in marked images, it is most like.

Nothing is trained. Shape suffixes: C classes, P prototypes, N patches, D width, H W pixels, h w patches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from unlabeled.dense.masks import OBJECT, Labels, MaskLike, labels_of, patch_shares
from unlabeled.dense.upsample import RADIUS, upsampled
from unlabeled.errors import UserError
from unlabeled.features.extractor import Extractor
from unlabeled.features.fitting import default_size, patch_grid, unit_rows
from unlabeled.features.inputs import ImageLike, as_pixels

if TYPE_CHECKING:
    from unlabeled.vit import VisionTransformer

PROTOTYPES = 128  # a class
RIDGE = 0.5  # of the covariance's mean variance, added to each of its variances
TEMPERATURE = 0.05  # of the soft maximum over a class's prototypes
PRIOR = 0.5  # power of the share of the marked patches: an object is expected to be as rare as it was
SMALLEST_GRID = 37  # patches along the short side, of the released models' images; a smaller grid is coarse
ITERATIONS = 20  # of k-means
SAMPLE = 1000  # patches a prototype that k-means sees at most


class Segmentation(NamedTuple):
    """One target's classes; C is in the order of `classes`."""

    mask: NDArray[np.uint8]  # (H, W) class numbers; 255 on the object and 0 elsewhere for masks of one object
    margin: NDArray[
        np.float32
    ]  # (H, W) similarity of the first class less the second's; object less background
    similarity: NDArray[np.float32]  # (C, h, w), see `Prototypes.similarity`; at most 1
    classes: tuple[int, ...]  # 0 and 1 for masks of one object


@dataclass(frozen=True)
class Prototypes:
    """What references say of their classes, for targets of any size.

    Attributes:
        vectors: float32 (P, D), of length 1.
        weights: float32 (P,), positive; those of a class sum to 1, and for masks of one object to (its share / the
            larger share) ** PRIOR of the marked patches; within a class each has that of the patches it stands for.
        owners: int64 (P,), the place of each prototype's class in `classes`.
        mean, whitening: float32 (D,) and (D, D): features x become (x - mean) @ whitening before a cosine is taken.
        classes: numbers, in ascending order.
        is_binary: whether the masks are of one object, 1, and its background, 0.
        radius: of the filter, see `upsampled`.
    """

    vectors: NDArray[np.float32]
    weights: NDArray[np.float32]
    owners: NDArray[np.int64]
    mean: NDArray[np.float32]
    whitening: NDArray[np.float32]
    classes: tuple[int, ...]
    is_binary: bool
    extractor: Extractor = field(repr=False)
    radius: float = RADIUS

    def identity(self) -> dict[str, Any]:
        """Everything that fixes a target's mask, as JSON types."""
        digest = hashlib.sha256()
        for array in (self.vectors, self.weights, self.owners, self.mean, self.whitening):
            digest.update(array.tobytes())
        return {
            "features": self.extractor.identity,
            "classes": list(self.classes),
            "is_binary": self.is_binary,
            "prototypes": digest.hexdigest(),
            "radius": self.radius,
        }

    def segment(self, target: ImageLike) -> Segmentation:
        """Return a target's classes. Raises UserError for what is no image, or is smaller than a patch."""
        pixels_HW3 = as_pixels(target)
        similarity_Chw = self.similarity(self.extractor(pixels_HW3))
        mask_HW, margin_HW = decided(similarity_Chw, pixels_HW3, self.radius)
        mask = mask_values(self.classes, self.is_binary)[mask_HW]
        if self.is_binary:
            margin_HW = np.where(mask == OBJECT, margin_HW, -margin_HW)
        return Segmentation(mask, margin_HW, similarity_Chw, self.classes)

    def similarity(self, features_hwD: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return how similar each patch is to each class, (C, h, w), at most 1.

        A soft maximum of the cosines with the class's prototypes: t log sum_p weight_p exp(cosine_p / t), t being
        TEMPERATURE.
        """
        white_hwD = ((features_hwD - self.mean) @ self.whitening).astype(np.float32, copy=False)
        cosines_NP = unit_rows(white_hwD) @ self.vectors.T
        powers_NP = np.exp((cosines_NP - 1) / TEMPERATURE) * self.weights
        sums_CN = np.stack([powers_NP[:, self.owners == c].sum(1) for c in range(len(self.classes))])
        similarity_CN: NDArray[np.float32] = (1 + TEMPERATURE * np.log(sums_CN)).astype(np.float32)
        return similarity_CN.reshape(-1, *features_hwD.shape[:2])


class References(NamedTuple):
    """Marked images."""

    names: list[str]
    images: list[NDArray[np.uint8]]  # (H, W, 3)
    labels: Labels


def segment(
    model: str | Path | VisionTransformer,
    target: ImageLike | Sequence[ImageLike],
    reference: ImageLike | Sequence[ImageLike],
    mask: MaskLike | Sequence[MaskLike | Sequence[MaskLike]],
    **options: Any,
) -> Segmentation | list[Segmentation]:
    """Return the classes of a target's pixels, found by what one or several marked images show; of a list, a list.

    model: a MODEL's text, or a backbone in evaluation mode. target: an image in any form, of any size.
    reference, mask: see `open_references`. options: those of `learn_prototypes`, which is to be called by itself where
        targets come one by one.
    Raises UserError as these two and `Prototypes.segment` do.
    """
    prototypes = learn_prototypes(model, open_references(reference, mask), **options)
    if isinstance(target, list | tuple):
        return [prototypes.segment(one) for one in target]
    return prototypes.segment(cast("ImageLike", target))


def open_references(
    reference: ImageLike | Sequence[ImageLike],
    mask: MaskLike | Sequence[MaskLike | Sequence[MaskLike]],
    class_names: Sequence[str] | None = None,
) -> References:
    """Return images with their masks.

    reference: one image, or a list. mask: of the image's size, see `labels_of`; for a list of images a list, and for
        one image one mask or a list of one an object. class_names: where given, masks with other numbers are refused.
    Raises UserError: something cannot be read, or an image and a mask do not fit each other.
    """
    if isinstance(reference, list | tuple):
        images, masks = (
            list(reference),
            cast("list[MaskLike]", list(mask) if isinstance(mask, list | tuple) else [mask]),
        )
    else:
        images, masks = [cast("ImageLike", reference)], cast("list[MaskLike]", [mask])
    if not images:
        raise UserError("Segmentation by reference needs at least one reference and its mask.")
    pixels = [as_pixels(image) for image in images]
    names = [
        str(image) if isinstance(image, str | Path) else f"image {number}"
        for number, image in enumerate(images, 1)
    ]
    shapes = [(one.shape[0], one.shape[1]) for one in pixels]
    return References(names, pixels, labels_of(masks, shapes, names, class_names))


def learn_prototypes(
    model: str | Path | VisionTransformer,
    references: References,
    *,
    num_prototypes: int = PROTOTYPES,
    size: int | None = None,
    layer: int = -1,
    radius: float = RADIUS,
    device: str = "auto",
    seed: int = 0,
) -> Prototypes:
    """Return what marked images say of their classes, the background's included.

    num_prototypes: of a class, at most; by spherical k-means over its patches, each weighed by the share of it
        that the mask marks. size: short side in pixels that the model sees; None: that of the images its position
        embedding is learned on, and at least SMALLEST_GRID patches. layer: the block whose patch tokens are taken.
    radius: of the filter, see `upsampled`.

    Features are whitened by the covariance of all the references' patches, which takes out what they all share.

    Raises:
        UserError: an image is smaller than a patch, or an option is out of range.
    """
    if num_prototypes < 1:
        raise UserError(f"A class has at least one prototype, not {num_prototypes}.")
    if radius < 0:
        raise UserError(f"The filter's radius is 0 or more patches, not {radius:g}.")
    extractor = dense_extractor(model, size, layer, device)
    for name, image in zip(references.names, references.images, strict=True):
        try:  # before the work
            height, width = image.shape[:2]
            patch_grid(height, width, extractor.preprocessing.patch_size, extractor.preprocessing.size)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    grids = cast("list[NDArray[np.float32]]", extractor(references.images))
    return prototypes_of(grids, references.labels, extractor, num_prototypes, radius, seed)


def prototypes_of(
    grids: Sequence[NDArray[np.float32]],
    labels: Labels,
    extractor: Extractor,
    num_prototypes: int = PROTOTYPES,
    radius: float = RADIUS,
    seed: int = 0,
) -> Prototypes:
    """`learn_prototypes`, from the patch features (h, w, D) of images and their labels."""
    features_ND = np.concatenate([grid.reshape(-1, grid.shape[-1]) for grid in grids])
    shares_CN = np.stack(
        [
            np.concatenate(
                [
                    patch_shares(one == number, (grid.shape[0], grid.shape[1])).ravel()
                    for one, grid in zip(labels.maps, grids, strict=True)
                ]
            )
            for number in labels.classes
        ]
    )
    mean, whitening = whitened(features_ND)
    rows_ND = unit_rows((features_ND - mean) @ whitening)
    vectors, weights = [], []
    marked_C = shares_CN.sum(1, dtype=np.float64)
    # Of several classes the rare ones count as much as the others, by what people ask for and by mIoU.
    prior = PRIOR if labels.is_binary else 0.0
    for shares_N, marked in zip(shares_CN, marked_C, strict=True):
        rows, shares = rows_ND[shares_N > 0], shares_N[shares_N > 0]
        means = spherical_kmeans(rows, shares, num_prototypes, seed)
        stands_for = np.bincount((rows @ means.T).argmax(1), shares, len(means))
        vectors.append(means[stands_for > 0])
        weights.append(stands_for[stands_for > 0] / marked * (marked / marked_C.max()) ** prior)
    return Prototypes(
        np.concatenate(vectors),
        np.concatenate(weights, dtype=np.float32),
        np.repeat(np.arange(len(vectors)), [len(one) for one in vectors]),
        mean,
        whitening,
        labels.classes,
        labels.is_binary,
        extractor,
        radius,
    )


def mask_values(classes: Sequence[int], is_binary: bool) -> NDArray[np.uint8]:
    """Return the number that each class has in a written mask, (C,)."""
    return np.array((0, OBJECT) if is_binary else classes, np.uint8)


def dense_extractor(
    model: str | Path | VisionTransformer, size: int | None, layer: int, device: str
) -> Extractor:
    """Return an extractor of patch features of whole images, in a grid that is fine enough for masks."""
    if isinstance(model, str | Path):
        from unlabeled.weights.load import load_model

        model = load_model(model)
    if size is None:
        size = max(default_size(model), SMALLEST_GRID * model.config.patch_size)
    return Extractor(model, "patches", layer=layer, size=size, shape="keep", device=device)


def whitened(
    features_ND: NDArray[np.float32], ridge: float = RIDGE
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the mean (D,) of features and W (D, D), with which (x - mean) @ W has about equal variances everywhere.

    W = (S + ridge * tr(S) / D * I)^(-1/2) for the covariance S, in float64. Features that are all the same have a W
    of zeros.
    """
    mean_D = features_ND.mean(0, dtype=np.float64)
    D = len(mean_D)
    scatter_DD = np.zeros((D, D))
    for start in range(0, len(features_ND), 4096):
        part = features_ND[start : start + 4096] - mean_D
        scatter_DD += part.T @ part
    variances, vectors = np.linalg.eigh(scatter_DD / len(features_ND))
    level = ridge * variances.clip(0).mean()
    if level <= np.finfo(np.float64).tiny:
        return mean_D.astype(np.float32), np.zeros((D, D), np.float32)
    whitening = (vectors / np.sqrt(variances.clip(0) + level)) @ vectors.T
    return mean_D.astype(np.float32), whitening.astype(np.float32)


def spherical_kmeans(
    rows_ND: NDArray[np.float32], weights_N: NDArray[np.float32], num_means: int, seed: int = 0
) -> NDArray[np.float32]:
    """Return at most `num_means` directions (K, D) of length 1: by k-means on the sphere, of weighed rows.

    rows: of length 1. As many rows as means or fewer are the means themselves.
    """
    import faiss

    if len(rows_ND) <= num_means:
        return np.ascontiguousarray(rows_ND)
    means = faiss.Kmeans(
        rows_ND.shape[1], num_means, niter=ITERATIONS, seed=seed + 1, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=SAMPLE,
    )  # fmt: skip
    means.train(np.ascontiguousarray(rows_ND), weights=np.ascontiguousarray(weights_N))
    found: NDArray[np.float32] = means.centroids
    return found


def decided(
    maps_Chw: NDArray[np.float32], pixels_HW3: NDArray[np.uint8], radius: float = RADIUS
) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the place of the largest of some maps at each pixel of an image, and by how much it is, (H, W) both."""
    return largest(upsampled(maps_Chw, pixels_HW3, radius))


def largest(maps: Iterable[NDArray[np.float32]]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Return the place of the largest of some maps (H, W), and by how much it is larger than the next, (H, W) both.

    One map at a time, so that memory does not grow with the classes. Of equals the first.
    """
    best = second = np.array(-np.inf, np.float32)
    place_HW = np.array(0)
    for place, values in enumerate(maps):
        higher = values > best
        second = np.where(higher, best, np.maximum(second, values))
        best = np.where(higher, values, best)
        place_HW = np.where(higher, place, place_HW)
    return place_HW, best - second
