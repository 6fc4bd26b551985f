"""Hub-format weights: read straight into the shards, and written back.

A rank reads the bytes it owns, and no rank ever holds the model:

    from_pretrained (api.py)                 inside accelerator.prepare (hooks.py)
    ------------------------                 -------------------------------------
    config, class, generation config:        experts sharded over (efsdp, ep), on meta
      transformers' own from_pretrained      the rest wrapped by accelerate, on meta
    headers -> LoadPlan, model on meta       memory for the shards -> `fill`: bytes into the shards
    missing weights and buffers: real        an optimizer made before gets its parameters back by name

transformers' own initialisation makes at once any weight that the files lack (a new head), and buffers that no file
has. They consume the random numbers that a plain from_pretrained would, and are sharded as any weight.

Between the two a user may edit the model. Each weight of the files is a tensor that knows it (deferred_tensors.py), so
its values follow it to wherever it is now. A tensor with values of its own keeps them (edits.py).

The seam is the one torchtitan uses (meta model, shard, allocate, fill). There DCP's planner places a file's tensors;
here transformers' renaming does, so that every family it can load can be loaded.
"""
