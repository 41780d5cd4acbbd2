"""Methods of the catalogue's papers that optax ships and has right.

They are used from optax; what is missing there (a schedule, a mask) is added here under
the name given, and nothing else.
"""

from typing import NamedTuple


class Reused(NamedTuple):
    """A method that optax has.

    Attributes:
      method: what its paper calls it.
      arxiv: arXiv identifier.
      use: the call.
      note: what to know, and what this package adds.
    """

    method: str
    arxiv: str
    use: str
    note: str


IN_OPTAX = (
    Reused(
        "Adafactor",
        "1804.04235",
        "optax.adafactor",
        "factors leaves whose two largest axes are 128 and more, and does not multiply "
        "weight_decay_rate by the learning rate; here: relative_step_schedule (golden "
        "adafactor_relative_step)",
    ),
    Reused(
        "AdEMAMix",
        "2409.03137",
        "optax.contrib.ademamix",
        "here: ademamix_b3_schedule, ademamix_alpha_schedule (golden ademamix)",
    ),
    Reused(
        "AMSGrad",
        "1904.09237",
        "optax.scale_by_amsgrad(bias_correction_mu=False, bias_correction_nu=False)",
        "this is the paper's; optax's default takes the maximum of the bias-corrected "
        "moment, torch corrects after the maximum: three trajectories; here: "
        "scale_by_adamnc, the paper's other method",
    ),
    Reused(
        "Annealed gradient noise",
        "1511.06807",
        "optax.add_noise(eta, gamma=0.55, key=...)",
        "variance eta / (1 + t)^gamma with t from 0; clip first, then add",
    ),
    Reused(
        "Lion",
        "2302.06675",
        "optax.lion",
        "golden lion_k_l1; here: scale_by_lion_k with other kernels, float32 momentum "
        "for bfloat16 parameters",
    ),
    Reused(
        "Lookahead with one set of parameters",
        "2104.09937",
        "optax.lookahead",
        "needs LookaheadParams; here: fish, the same on plain parameters",
    ),
    Reused(
        "NovoGrad",
        "1905.11286",
        "optax.novograd(learning_rate, b1=0.95, b2=0.98, eps=1e-8)",
        "the paper's setting, optax's defaults are others (golden novograd)",
    ),
    Reused(
        "RAdam",
        "1908.03265",
        "optax.radam",
        "golden radam; here: rectification_schedule, for the official class's variant "
        "that does not move while the variance is untamed",
    ),
    Reused(
        "Linear decay to zero",
        "2310.07831",
        "optax.linear_schedule(peak, 0.0, steps)",
        "the paper's answer without gradient norms of an earlier run; here: "
        "refined_schedule, with them",
    ),
)
