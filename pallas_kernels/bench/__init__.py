"""Sparse products against dense ones on this GPU: `python -m pallas_kernels.bench`.

products    which matrices: layers of models, the five uses of training, squares
timing      the clock: interleaved rounds, buffers in rotation
contenders  what races: a kernel, `jnp.dot`, cuSPARSELt, a copy; each judged first
search      which Configs there are to try
tuning      a race of Configs, whose winners are committed
roofline    what no kernel can beat, from data sheets
report      the table, the JSON and the plot
"""
