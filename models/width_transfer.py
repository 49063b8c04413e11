"""Learning rates that are tuned at one width and used at another: μP with Muon.

Every update shall change the features by the same amount at every width. For a hidden matrix that
is a spectral norm of lr sqrt(outputs / inputs) (Yang, Simon and Bernstein, arXiv:2310.17813;
with Muon arXiv:2505.02222). AdamW moves every entry by about lr. A row of an embedding is read
alone: its lr stays. A head sums over its inputs, all of whose products move in one direction: its
lr goes with 1 / width.
"""

from lit_fanions import FanionConfig
from lit_fanions.checks import whole_number


def transfer_learning_rates(config: FanionConfig, base_width: int, width: int) -> FanionConfig:
    """Return the configuration for a width, from one whose lr were tuned at another.

    Matrices take the scale rule spectral_unclamped. A head's lr is multiplied by base_width /
    width, and its weight decay, which acts through the lr, divided by it.

    Args:
        config: Configuration for ``base_width``.
        base_width: Features of the residual stream of the network that was tuned.
        width: Features of the residual stream of the network to train.

    Raises:
        ValueError: If the head is not stepped by AdamW with an lr of its own or of ``other``.
    """
    whole_number("base_width", base_width)
    given = config.to_dict()
    head = {**given.get("other", {}), **given.get("overrides", {}).get("head", {})}
    algorithm = head.get("algorithm", "adamw")
    if algorithm != "adamw" or "lr" not in head:
        raise ValueError(
            f"base_width={base_width}: the head is stepped by {algorithm} with lr "
            f"{head.get('lr')}; how lr goes with the width is known for adamw: set the head's lr "
            "in other or in overrides.head"
        )
    changed = {"lr": head["lr"] * base_width / width}
    if "weight_decay" in head:
        changed["weight_decay"] = head["weight_decay"] * width / base_width
    overrides = given.get("overrides", {})
    head = {**overrides.get("head", {}), **changed}
    return config.updated({"scale": "spectral_unclamped", "overrides": {**overrides, "head": head}})
