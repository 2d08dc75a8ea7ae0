"""What the numbers of a report mean: a definition for each section and each column, with its source."""

HISTORY = (
    "The score of every domain at every checkpoint. What a domain lost is its score at its own stage (the checkpoint "
    "of the same name; else its best before the last) less that of the last checkpoint; beside it the stage whose "
    "step cost most. A loss counts as certain where its 95 % interval lies above zero and p < 0.05."
)
SCORE = (
    "Unless an evaluation was given, the score is the log-likelihood of the responses: per prompt the mean over its "
    "response tokens, in nats per token; 0 is certainty. It is measured on every other prompt, and what chooses "
    "neurons sees the rest."
)
ROLLBACK = (
    "Neurons of the last checkpoint are set back to the checkpoint where the domain was best, and the score is "
    "measured on prompts that chose nothing. Recovery = (score − score of later) / (score of earlier − score of "
    "later). D: ranked by the damage score; A×M×C: the paper's selector; random: the control; ceiling: all MLP "
    "neurons. The refresh trains all parameters for a few steps towards the earlier checkpoint's answers. Source: the "
    "paper's Table 6 in kind; D and the refresh from the earlier model's answers are ours."
)
SITES = (
    "D_n = ⟨∇KL(p_earlier ‖ p_later), δ_n⟩: to first order, what setting neuron n back would gain, in nats per "
    "response token. Shown is the sum of the positive ones by block. Ours, from the paper's Proposition 1."
)
TERMS = (
    "Proposition 1 of the paper: along θ_A + t·δ the domain's loss rises by t⟨∇L, δ⟩ + ½ t² δᵀHδ plus a remainder. "
    "The loss is the divergence from the earlier checkpoint, whose slope there is zero. A large remainder means that "
    "the change is too far for the theory's local picture."
)
CHANGES = (
    "Δ is a checkpoint's parameter less the same one of the checkpoint it is compared with. Absolute: abs(Δ); "
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
CHANGE = "Score less that of the last checkpoint as it is; below zero something is lost."
CHANGED_LAYER = "‖Δ‖ of that stage in that layer, in percent of ‖θ‖ before it; or the score after that stage."
NEAR = "Parameters whose change stays below the threshold, in percent; those that did not change at all count too."
COLUMNS = {
    "domain": "A set of prompts, as named by --data.",
    "from": "The checkpoint that the loss counts from: the domain's own stage, or its best.",
    "to": "The last checkpoint.",
    "lost": "Score at “from” less score at “to”; above zero is a loss.",
    "low": "Lower end of the loss's 95 % interval (paired bootstrap over prompts).",
    "high": "Upper end of the loss's 95 % interval (paired bootstrap over prompts).",
    "p": "Of a two-sided paired test against no difference: exact McNemar for right or wrong, else random signs.",
    "largest step": "The stage whose own step changed the score most for the worse, and by how much.",
    "repair": "What was set back or trained.",
    "budget (%)": "How many of all MLP neurons were set back, in percent.",
    "recovery (%)": "The part of the loss that came back, in percent; 100 is all of it.",
    "recovery, low (%)": "Lower end of the recovery's 95 % interval (paired bootstrap over prompts).",
    "recovery, high (%)": "Upper end of the recovery's 95 % interval (paired bootstrap over prompts).",
    "score": "Less the loss on all prompts that choose; the weights with the highest are kept.",
    "step": "Of the refresh; 0 is before the first.",
    "loss": "On the step's own batch, in nats per response token, before the step; of gradients: over all batches.",
    "gradient": "L2 norm of the gradient over what is trained.",
    "seconds": "Of the step.",
    "block": "An MLP or an attention, by its module path.",
    "kind": "Kind of unit or module.",
    "units": "How many neurons (or other units) there are.",
    "sum of scores": "The positive D added up, in nats per response token.",
    "share of all (%)": "Of the sum over all blocks.",
    "t": "Fraction of the way from the earlier to the later checkpoint.",
    "true": "How far the loss really rises.",
    "first order": "t⟨∇L, δ⟩ at the earlier checkpoint.",
    "second order": "½ t² δᵀHδ with the curvature at the earlier checkpoint.",
    "remainder": "What the two terms leave unexplained.",
    "second / true": "1 where the second-order term explains all of the rise.",
    "stage": "The checkpoint, by the stage that led to it.",
    "against": "The checkpoint that it is compared with.",
    "parameters": "How many there are.",
    "Δ = 0 (%)": "Parameters whose value did not change at all.",
    "‖Δ‖": "L2 norm of the change, in the unit of the weights.",
    "‖Δ‖/‖θ‖ (%)": "The same relative to the norm before.",
    "layer": "A layer of the model.",
    "neurons": "How many neurons the number is over.",
    "pair": "Two stages or two domains.",
    "whole model": "Jaccard of the two sets, taken from the whole model.",
    "chance": "Expected of two random sets of those sizes.",
    "chance, layers kept": "Expected of random sets that take as many neurons of each layer as these do.",
    "chance in a layer": "Expected of two random sets of a layer's neurons, averaged over the layers.",
    "mean over layers": "Jaccard of the top shares of each layer by itself, averaged.",
    "by chance": "How many neurons two independent sets of those sizes would share.",
    "mean cosine": "Mean over the shared neurons; −1 to 1.",
    "quartiles": "A quarter of the neurons lies below the first, a quarter above the second.",
    "below 0 (%)": "Neurons whose two updates point against each other.",
    "null, 95 %": "Where the mean cosine lies if each update is paired with another neuron's.",
    "response tokens": "How many tokens the mean is over.",
    "gradient norm": "L2 norm of the domain's gradient, of the mean loss.",
    "tensors without gradient": "Tensors whose gradient is exactly zero, like those of experts that no token reached.",
    "part": "The whole model, or all its modules of a kind.",
    "module": "A module, by its path.",
    "domains": "Two domains.",
    "cosine": "Of the two domains' gradients: below zero conflict, above zero synergy.",
}
