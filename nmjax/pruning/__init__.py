"""Pruning after training: N:M weights from a trained model and a few batches.

    pruned = nmjax.pruning.sparse_gpt(model, rules, batches, variables=variables)
    accuracy(model, {**variables, "params": pruned.params})

Neither method trains the network: each looks at one layer at a time and at what it
receives. Both start from a dense linen or nnx model and give back ordinary parameters
with zeros, which can be served as they are, or fine-tuned with frozen masks:
`nmjax.sparsify(model, [nmjax.Rule(".*", nmjax.recipes.one_shot("2:4"))])`.
"""

from nmjax.pruning.reconstruction import ada_prune as ada_prune
from nmjax.pruning.report import LayerReport as LayerReport
from nmjax.pruning.report import Pruned as Pruned
from nmjax.pruning.second_order import obs_prune as obs_prune
from nmjax.pruning.second_order import sparse_gpt as sparse_gpt
