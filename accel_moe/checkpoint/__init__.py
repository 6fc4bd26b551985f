"""Checkpoints: DCP folders with a manifest beside them, and the road from there to Hub-format safetensors.

    manifest.py   what a checkpoint holds, written last; checksums; the checks that need no process group
    durable.py    fsync and flock, where a file system may refuse them
    folders.py    temporary names, who fills them, which folders are committed, cleaning, rotation
    transaction.py    the commit, and what finishes it after a kill
    advice.py     what to do about an error of the operating system
    dcp.py        torch.distributed.checkpoint with checksums: the writer, the reader, the bounded one-
                  process reader
    dcp_metadata.py   DCP's description of a folder, read without running what it says
    ranks.py      agreement between ranks: an error that one rank can see is raised on all of them
    background.py saves in the background, and ends of the process that wait for them
    node_local.py the disks of several nodes as one checkpoint
    saving.py     one save of model, optimizer and everything else as one commit, at once or in the background
    verify.py     one checkpoint on all ranks, its bytes those of the save, its tensors the model's
    resume.py     which checkpoint a run resumes from: the newest that is whole everywhere
    loading.py    DCP's values into the shards, after verification
    for_accelerate.py, for_trainer.py   accelerate's and Trainer's saves and loads, as they run here
    export.py     DCP → Hub format, group by group, in bounded memory: opens and checks the checkpoint;
                  export_plan.py, export_write.py, export_out.py and export_verify.py do the rest; base_model.py
                  has the base, quantised.py refuses some

Nothing is imported here: consolidate runs on a login node and must not pay for what only training needs.
"""
