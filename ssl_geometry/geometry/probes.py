"""What can be read off frozen features: here, by their nearest neighbours.

Protocol: the bank holds clean (un-augmented) training images, features are L2-normalised, similarity is cosine, and a
query's neighbours vote with weight exp(similarity / temperature), as in Wu et al. 2018.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def knn_predict(
    queries: Float[Tensor, "N D"],
    bank: Float[Tensor, "M D"],
    labels: Int64[Tensor, " M"],
    num_classes: int,
    k: int = 20,
    temperature: float | None = 0.07,
    chunk: int = 1024,
) -> Int64[Tensor, " N"]:
    """Predict classes by a vote of the k most similar images of the bank.

    Args:
        queries: features to classify.
        bank: features with known classes.
        labels: classes of the bank, in [0, num_classes).
        num_classes: number of classes.
        k: neighbours that vote; the whole bank votes where it is smaller.
        temperature: a neighbour votes with weight exp(cosine / temperature); None counts heads.
        chunk: queries compared at once; bounds the memory at ``chunk * M`` similarities.

    Returns:
        The class with the largest vote for each query (the smaller class number on ties).

    Raises:
        ValueError: an empty bank, or k < 1.

    References:
        Wu et al., *Unsupervised feature learning via non-parametric instance discrimination*, 2018, section 3.4.

    Example:
        >>> bank = torch.eye(3).repeat(4, 1)
        >>> knn_predict(torch.eye(3) + 0.1, bank, torch.arange(3).repeat(4), num_classes=3, k=4)
        tensor([0, 1, 2])
    """
    if len(bank) == 0 or k < 1:
        raise ValueError(
            f"k-nearest-neighbour classification needs a bank and k >= 1, got {len(bank)} images and k={k}"
        )
    bank = F.normalize(bank.float(), dim=1)
    k = min(k, len(bank))
    predictions = []
    for part in queries.split(chunk):
        similarity, neighbours = (F.normalize(part.float(), dim=1) @ bank.T).topk(k, dim=1)
        # exp(s/T) up to a factor that every vote of the query shares: no overflow at small temperatures
        weights = (
            torch.ones_like(similarity)
            if temperature is None
            else ((similarity - similarity[:, :1]) / temperature).exp()
        )
        votes = weights.new_zeros(len(part), num_classes).scatter_add_(1, labels[neighbours], weights)
        predictions.append(votes.argmax(1))
    return torch.cat(predictions) if predictions else labels.new_empty(0)
