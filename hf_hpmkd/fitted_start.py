"""Starts a smaller MLP from a larger one: the hidden units that explain its logits best, what follows fitted to them.

Closed forms on a few thousand rows; trains nothing. Leading units, which `warm_start` copies, are units like any other,
and an MLP of one layer that starts with a deeper one's classifier reads features that it does not have.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_hpmkd.models import TabularForClassification
from hf_hpmkd.warm_start import class_names, relative_place

MOST_ROWS = 2_000
"""Rows that are enough."""

_RIDGE = 1e-2  # on features of unit variance
_NOTHING_NEW = 1e-6  # share of a feature's variance that those before it leave


def can_fit(model: nn.Module, above: nn.Module) -> bool:
    """Whether `fit_start` has something to do: MLPs of the same classes, with hidden layers of other sizes."""
    return (
        isinstance(model, TabularForClassification)
        and isinstance(above, TabularForClassification)
        and class_names(model) == class_names(above)
        and len(above.hidden) > 0
        and model.config.hidden_sizes != above.config.hidden_sizes
    )


@torch.no_grad()
def fit_start(model: nn.Module, above: nn.Module, inputs: dict[str, Tensor]) -> None:
    """Gives `model` units of `above`, in place, and fits every layer behind them to it by ridge regression.

    inputs: `numeric` and `categorical` of some training rows, as `forward` takes them. To be called after `warm_start`,
    which copies the embeddings. Layer i of m takes its units from layer round(i (a - 1) / (m - 1)) of a. Units that
    `above` cannot fill keep their values. Deterministic. Raises ValueError unless `can_fit`.
    """
    if not can_fit(model, above):
        raise ValueError("Only an MLP can be fitted, to another one of the same classes and other layers.")
    assert isinstance(model, TabularForClassification) and isinstance(above, TabularForClassification)
    read = {name: value.to(above.device) for name, value in inputs.items()}
    x, before = above.embed(**read), []  # before: what goes into each ReLU of the larger one
    for layer in above.hidden:
        before.append(layer(x))
        x = F.relu(before[-1])
    logits = above.classifier(x).float()
    logits = (logits - logits.mean(1, keepdim=True)).to(model.device)
    x = model.embed(**{name: value.to(model.device) for name, value in inputs.items()})
    for index, layer in enumerate(model.hidden):
        assert isinstance(layer, nn.Linear)
        place = relative_place(index, len(model.hidden), len(above.hidden))
        theirs = before[place].float().to(model.device)
        units = choose_units(F.relu(theirs), logits, layer.out_features)
        if place == 0 and index == 0:  # both read the same inputs
            first = above.hidden[0]
            assert isinstance(first, nn.Linear)
            weight, bias = first.weight.to(model.device)[units], first.bias.to(model.device)[units]
        else:
            weight, bias = ridge(x, theirs[:, units])
        layer.weight[: len(units)], layer.bias[: len(units)] = weight, bias
        x = F.relu(layer(x))
    weight, bias = ridge(x, logits)
    model.classifier.weight.copy_(weight)
    model.classifier.bias.copy_(bias)


def choose_units(features: Tensor, targets: Tensor, count: int) -> Tensor:
    """The features that explain the targets best together, found one after the other: each the one that leaves the
    least squared error beside those before it (orthogonal least squares, Chen, Cowan & Grant 1991).

    features: `(rows, units)`. targets: `(rows, outputs)`. Returns positions `(chosen,)`, the best first; fewer than
    `count` where the rest are constant or add nothing to the others.
    """
    x, y = _centred(features), _centred(targets)
    scale = x.square().mean(0).sqrt()
    x = x / torch.where(scale > 0, scale, 1.0)
    gram, cross = x.T @ x / len(x), x.T @ y / len(x)
    chosen: list[int] = []
    for _ in range(min(count, x.shape[1])):
        left = gram.diagonal()  # variance that the chosen ones do not explain
        gains = torch.where(left > _NOTHING_NEW, cross.square().sum(1) / left.clamp_min(_NOTHING_NEW), -1.0)
        gains[chosen] = -1.0
        best = int(gains.argmax())
        if gains[best] < 0:
            break
        chosen.append(best)
        column, row = gram[:, best] / left[best], cross[best].clone()
        gram, cross = gram - torch.outer(column, gram[best]), cross - torch.outer(column, row)
    return torch.tensor(chosen, dtype=torch.long, device=features.device)


def ridge(features: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Weight `(outputs, units)` and bias `(outputs,)` of the linear map that fits targets `(rows, outputs)` to features
    `(rows, units)` by least squares, slightly shrunk; features that are constant get weight 0.
    """
    x, y = _centred(features), _centred(targets)
    scale = x.square().mean(0).sqrt()
    x = x / torch.where(scale > 0, scale, 1.0)
    gram = x.T @ x / len(x) + _RIDGE * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weight = (torch.linalg.solve(gram, x.T @ y / len(x)) / torch.where(scale > 0, scale, 1.0)[:, None]).T
    bias = targets.double().mean(0) - weight @ features.double().mean(0)
    return weight.to(targets.dtype), bias.to(targets.dtype)


def _centred(values: Tensor) -> Tensor:
    return values.double() - values.double().mean(0)
