"""What the numbers of a report mean: a definition for each section and each column, with its source."""

from __future__ import annotations

SCORE = (
    "Unless an evaluation was given, the score is the log-likelihood of the responses: per prompt the mean over its "
    "response tokens, in nats per token; 0 is certainty. It is measured on every other prompt; the other half of the "
    "prompts chooses the neurons."
)
ROLLBACK = (
    "Neurons of the last checkpoint are set back to the checkpoint where the domain was best, and the score is "
    "measured on the prompts that did not choose them. Recovery = (score − score of later) / (score of earlier − score "
    "of later). D: ranked by the damage score; A×M×C: the paper's selector; random: the control; ceiling: all MLP "
    "neurons. The refresh trains all parameters for a few steps towards the earlier checkpoint's answers. Source: the "
    "paper's Table 6 in kind; D and the refresh from the earlier model's answers are ours."
)
SITES = (
    "D_n = ⟨∇L, δ_n⟩, with L the Hellinger distance between the later and the earlier model's predictions, the mean "
    "over response tokens: the first-order gain of setting neuron n back. The table has the sum of the positive D by "
    "block. Ours, from the paper's Proposition 1."
)
TERMS = (
    "Proposition 1 of the paper: along θ_A + t·δ the domain's loss rises by t⟨∇L, δ⟩ + ½ t² δᵀHδ plus a remainder. "
    "The loss is the KL divergence from the earlier checkpoint, whose gradient there is zero. A large remainder means "
    "that the change is too large for the local theory."
)
TOKENS = (
    "The probability that each model gives to a token of the response, after the prompt and the response up to there, "
    "in whole percent; in brackets the token that it finds likelier, if there is one. Marked is what lies at least 10 "
    "points below (▾) or above (▴) the first model. The prompts are from the half that did not choose the repair; "
    "those whose response lost most log-likelihood come first. Ours."
)
CHANGES = (
    "Δ is a checkpoint's parameter minus the same parameter of the checkpoint it is compared with. Absolute: abs(Δ); "
    "relative: abs(Δ) / abs(θ before). Near zero: below the threshold in the column's head. In 16-bit checkpoints a "
    "change below one rounding step is no change at all. Source: the paper, Section 4 and Appendix B."
)
CHANGED = (
    "Each stage's most changed neurons are the 10 % with the largest ‖δ_n‖ of the model. Jaccard = shared / all of "
    "both; 1 is the same set. Chance: two random sets of those sizes. Source: the paper, Section 4."
)
ACTIVE = (
    "Each domain's most active neurons are the 5 % with the largest mean abs(h_n) on its prompts, at the last "
    "checkpoint. Jaccard = shared / all of both. Chance: two random sets of those sizes. Source: the paper, Section "
    "4."
)
DIRECTIONS = (
    "On the neurons that are among the 10 % most changed of their layer in both stages, the cosine of the two "
    "updates of each neuron (gate, up and down end to end): −1 they undo each other, +1 they agree. Band: where the "
    "mean lies if each update is paired with another neuron's. Source: the paper's Figure 4; the null is ours."
)
CHANGE = "The score minus that of the last checkpoint before the repair; below zero is a loss."
CHANGED_LAYER = "‖Δ‖ of that stage in that layer, in percent of ‖θ‖ before it; or the score after that stage."
NEAR = "Parameters whose change stays below the threshold, in percent; those that did not change at all count too."
COLUMNS = {
    "domain": "A set of prompts, as named by --data.",
    "from": "The checkpoint that the loss counts from: the domain's own stage, or its best.",
    "to": "The last checkpoint.",
    "lost": "Score at “from” minus score at “to”; above zero is a loss. In brackets its 95 % interval (paired "
    "bootstrap over prompts).",
    "p": "p-value of a two-sided paired test: exact McNemar for 0/1 scores, else a sign-flip permutation test.",
    "largest step": "The stage that lowered the score most, and by how much.",
    "repair": "What was set back or trained.",
    "budget (%)": "How many of all MLP neurons were set back, in percent; for a given mask, of what it chose among.",
    "recovery (%)": "The part of the loss that came back, in percent; 100 is all of it. In brackets its 95 % interval "
    "(paired bootstrap over prompts).",
    "model": "A checkpoint, or the last one with a repair.",
    "mean probability (%)": "Mean over the response tokens.",
    "tokens that fell": "Response tokens whose probability is at least 10 points lower than in the first model.",
    "tokens that rose": "Response tokens whose probability is at least 10 points higher than in the first model.",
    "score": "Minus the loss on the prompts that choose; the weights with the highest score are kept.",
    "step": "The step of the refresh; 0 is the model before the first one.",
    "loss": "In a refresh, on the step's own batch before the step; of gradients, over all batches. In nats per token.",
    "gradient": "L2 norm of the gradient over the trained numbers.",
    "seconds": "Duration of the step.",
    "block": "An MLP or an attention, by its module path.",
    "kind": "Kind of unit or module.",
    "units": "How many neurons (or other units) there are.",
    "sum of scores": "Sum of the positive D, in units of the Hellinger distance (0 to 1).",
    "share of all (%)": "Share of the sum over all blocks.",
    "t": "Fraction of the way from the earlier to the later checkpoint.",
    "true": "The measured rise of the loss.",
    "first order": "t⟨∇L, δ⟩ at the earlier checkpoint.",
    "second order": "½ t² δᵀHδ with the curvature at the earlier checkpoint.",
    "remainder": "What the two terms leave unexplained.",
    "second / true": "1 where the second-order term explains all of the rise.",
    "stage": "The checkpoint, by the stage that led to it.",
    "against": "The checkpoint that it is compared with.",
    "parameters": "Number of parameters.",
    "Δ = 0 (%)": "Parameters whose value did not change at all.",
    "‖Δ‖": "L2 norm of the change, in the unit of the weights.",
    "‖Δ‖/‖θ‖ (%)": "The norm of the change relative to the norm of the parameters before it.",
    "layer": "A layer of the model.",
    "neurons": "How many neurons the row counts.",
    "pair": "Two stages or two domains.",
    "whole model": "Jaccard of the two sets, taken from the whole model.",
    "chance": "Expected Jaccard of two random sets of the same sizes.",
    "chance, layers kept": "Expected Jaccard of random sets with the same numbers of neurons in each layer.",
    "chance in a layer": "Expected Jaccard of two random sets of a layer's neurons, averaged over the layers.",
    "mean over layers": "Jaccard of the top shares within each layer, averaged over the layers.",
    "by chance": "How many neurons two independent sets of those sizes would share.",
    "mean cosine": "Mean over the shared neurons; −1 to 1.",
    "quartiles": "A quarter of the neurons lies below the first, a quarter above the second.",
    "below 0 (%)": "Neurons whose two updates point against each other.",
    "null, 95 %": "95 % of the mean cosines if each update is paired with another neuron's.",
    "response tokens": "How many tokens the mean is over.",
    "gradient norm": "L2 norm of the gradient of the domain's mean loss.",
    "tensors without gradient": "Tensors whose gradient is exactly zero, like those of experts that no token reached.",
    "part": "The whole model, or all its modules of a kind.",
    "module": "A module, by its path.",
    "domains": "Two domains.",
    "cosine": "Cosine of the two domains' gradients: conflict below zero, synergy above.",
}
