"""The objectives that objectives_beside_trl.py compares: keel's settings, the trainer of TRL 1.16, and its settings."""

from dataclasses import dataclass
from typing import Any

LENGTH_LIMIT = 24  # tokens; longer than every response of the batch, so that a constant divisor is not a length


@dataclass(frozen=True)
class Case:
    """One objective on both sides."""

    name: str
    rows: str  # of the batch: policy, pairs, one-token prompts, labels, scored pairs
    keel: dict[str, Any]  # settings: `algorithm` of keel train, or those of keel dpo and keel reward
    trainer: str  # of TRL
    trl: dict[str, Any]
    one_by_one: bool = False  # TRL reads each pair as a batch, and the losses are averaged
    on_policy: bool = False  # the policy that sampled is the current one: every ratio is 1
    gradient_only: bool = False  # the losses have the same gradient, but not the same value
    factor: float = 1.0  # TRL's loss and gradient over keel's
    differs: bool = False  # by definition, for the reason in the note
    note: str = ""


def grpo(name: str, keel: dict[str, Any], trl: dict[str, Any], **rest: Any) -> Case:
    """Return a case of keel's grpo and TRL's GRPOTrainer, without a KL by default."""
    return Case(name, "policy", {"name": "grpo", "kl_coef": 0.0, **keel}, "GRPO", {"beta": 0.0, **trl}, **rest)


def pairs(name: str, keel: dict[str, Any], trl: dict[str, Any], trainer: str = "DPO", **rest: Any) -> Case:
    """Return a case of keel dpo and of a trainer of TRL, with the same beta."""
    rows = rest.pop("rows", "pairs")
    return Case(name, rows, {"beta": 0.1, **keel}, trainer, {"beta": 0.1, **trl}, **rest)


PLAIN_KL = {"beta": 0.04, "use_bias_correction_kl": False}
K3 = {"kl_in": "loss", "kl_estimator": "k3", "kl_coef": 0.04}
SEQUENCES, GEOMETRIC = {"loss_aggregation": "sequence"}, {"ratio_level": "sequence"}
NEAR = {"clip_range_low": 0.03, "clip_range_high": 0.05}  # the mean log-ratio of a response is small
SMOOTH = {"label_smoothing": 0.1}

CASES = (
    grpo("GRPO", SEQUENCES, {"loss_type": "grpo"}),
    grpo("GRPO, k3 KL in the loss", SEQUENCES | K3, {"loss_type": "grpo", **PLAIN_KL}),
    grpo(
        "GRPO, k3 KL, TRL's default",
        SEQUENCES | K3,
        {"loss_type": "grpo", "beta": 0.04},
        differs=True,
        note="TRL multiplies the k3 estimate by the ratio to the old policy (use_bias_correction_kl, DeepSeek-V3.2); "
        "keel has the estimate of Shao et al. 2024, eq. 4, without a ratio",
    ),
    grpo("GRPO, BNPO", {}, {"loss_type": "bnpo"}, note="on one process; TRL takes the token mean per process"),
    grpo("DAPO, clip-higher", {"clip_range_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    grpo("DAPO, k3 KL in the loss", K3, {"loss_type": "dapo", **PLAIN_KL}),
    grpo("DAPO, entropy bonus", {"entropy_coef": 0.01}, {"loss_type": "dapo", "entropy_coef": 0.01}),
    grpo("DAPO, dual clip", {"dual_clip": 1.3}, {"loss_type": "dapo", "delta": 1.3}),
    grpo("Dr.GRPO", {"loss_aggregation": "constant"}, {"loss_type": "dr_grpo"}),
    grpo(
        "GSPO",
        SEQUENCES | GEOMETRIC | NEAR,
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.05},
    ),
    grpo(
        "GSPO, k3 KL, token mean",
        GEOMETRIC | NEAR | K3,
        {
            "loss_type": "dapo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.03,
            "epsilon_high": 0.05,
            **PLAIN_KL,
        },
    ),
    grpo(
        "CISPO",
        {"clip_target": "weight", "clip_range_low": 1.0, "clip_range_high": 0.28},
        {"loss_type": "cispo", "epsilon_high": 1.28},
        note="TRL's epsilon_high is the largest weight itself, 1 + clip_range_high; it has no lower limit",
    ),
    Case(
        "RLOO",
        "policy",
        {"name": "rloo", "kl_coef": 0.0, "loss_aggregation": "constant"},
        "RLOO",
        {"beta": 0.0},
        on_policy=True,
        gradient_only=True,
        factor=LENGTH_LIMIT,
        note="TRL sums the tokens of a response, keel divides by the length limit; in further steps on the same batch, "
        "which keel's rloo does not take, TRL clips the ratio of the full response",
    ),
    pairs("DPO", {"loss": "sigmoid"}, {"loss_type": ["sigmoid"]}),
    pairs("DPO, length-normalized", {"length_normalized": True}, {"loss_type": ["sigmoid_norm"]}),
    pairs(
        "DPO with NLL, pair by pair",
        {"nll_coef": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        one_by_one=True,
    ),
    pairs(
        "DPO with NLL, one batch",
        {"nll_coef": 0.5},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        differs=True,
        note="TRL's NLL is a mean over the tokens of the batch; keel's is over each response, then over the pairs "
        "(Pang et al. 2024, eq. 1)",
    ),
    pairs(
        "conservative DPO",
        SMOOTH,
        {"loss_type": ["aot_unpaired"], **SMOOTH},
        one_by_one=True,
        note="TRL's sigmoid ignores label_smoothing; aot_unpaired on one pair is the same formula",
    ),
    pairs(
        "conservative DPO, robust",
        SMOOTH,
        {"loss_type": ["robust"], **SMOOTH},
        differs=True,
        note="robust DPO (Chowdhury et al. 2024) is another loss: (1 - e) L(d) - e L(-d), over 1 - 2e",
    ),
    pairs("IPO, length-normalized", {"loss": "ipo", "length_normalized": True}, {"loss_type": ["ipo"]}),
    pairs(
        "IPO",
        {"loss": "ipo"},
        {"loss_type": ["ipo"]},
        differs=True,
        note="TRL divides the log-ratios by the lengths; keel sums, as in Azar et al. 2023, eq. 17",
    ),
    pairs(
        "SimPO",
        {"loss": "simpo", "beta": 2.0, "target_margin": 1.0},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
        "CPO",
    ),
    pairs(
        "SimPO, label smoothing",
        {"loss": "simpo", "beta": 2.0, "target_margin": 1.0, **SMOOTH},
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0, **SMOOTH},
        "CPO",
    ),
    pairs(
        "ORPO, one-token prompts, pair by pair",
        {"loss": "orpo"},
        {},
        "ORPO",
        rows="one-token prompts",
        one_by_one=True,
    ),
    pairs(
        "ORPO",
        {"loss": "orpo"},
        {},
        "ORPO",
        differs=True,
        note="TRL's NLL is a mean over the tokens of the batch, and includes those of the prompt",
    ),
    Case(
        "KTO",
        "labels",
        {"loss": "kto", "beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.8},
        "KTO",
        {"beta": 0.1, "desirable_weight": 1.2, "undesirable_weight": 0.8},
        note="the same mismatched pairs; TRL takes the previous row of the micro-batch, keel the next other prompt",
    ),
    Case("reward, margins", "scored pairs", {"center_coef": 0.0}, "Reward", {}),
    Case(
        "reward, margins, centred",
        "scored pairs",
        {"center_coef": 0.01},
        "Reward",
        {"center_rewards_coefficient": 0.01},
    ),
    Case("SFT", "pairs", {}, "SFT", {}, note="on the chosen responses"),
)
