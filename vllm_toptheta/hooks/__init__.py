"""Everything of vLLM's that this package wraps or adds to, one file per class. The ledger:

`attention_backend`: a member of `AttentionBackendEnum` that pickles as a call of ours.
    Spawned processes unpickle the configuration before they load plug-ins.
    Can go when vLLM pickles registered members.
`platform`: `get_attn_backend_cls` of the platform.
    On a CPU it replaces every backend but CPU_ATTN by CPU_ATTN; and vLLM asks a class, without a
    configuration, how large pages are, so that options choose the class.
    Can go when the CPU platform honours registered backends, and `customize_spec` is given a
    configuration.
`vllm_config`: `VllmConfig.compute_hash`.
    It takes our options for part of the compiled graph: a start with another dial would compile
    the model again.
    Can go when a plug-in may say what of `additional_config` counts.
`engine_args`: `EngineArgs.create_engine_config` and `.from_cli_args`.
    Nobody asks plug-ins about their options before processes are spawned, where a wrong one is one
    line and not a worker's stack trace; nor may plug-ins add HTTP middleware.
    Can go when vLLM validates `additional_config` through plug-ins and takes their middleware.
`input_processor`: `InputProcessor.process_inputs`.
    Every way into the engine comes by here: options of a request are checked, and its prefix-cache
    salt is set.
    Can go when plug-ins may check requests, and extend block hashes.
`model_runner`: `GPUModelRunner.execute_model` and `.sample_tokens`, V1's and V2's, from which those
    of the CPU inherit; `get_output` of a V2 output; an attribute of `ModelRunnerOutput`.
    Attention metadata name no requests, and the output of a step has no room for counts.
    Can go when backends learn the requests of a batch, and may add to the output.
`scheduler`: `Scheduler.update_from_output`.
    Counts travel to the server in `kv_transfer_params` of engine outputs: a free dict, exact to the
    last token, that needs no KV connector.
    Can go when vLLM has a channel from a backend to a response.
`output_processor`: `OutputProcessor.add_request` and `.process_outputs`.
    The other end of the same.
`worker`: `WorkerBase.toptheta_heads`.
    `collective_rpc` reaches methods of the worker only.
    Can go when backends may publish some.

All of this is alike in the tested versions, vLLM 0.30 to 0.33, but that older enums than 0.32's
cannot take a member, and layers of a draft are not marked in 0.30. Where no engine of a process has
`telemetry`, nothing of `scheduler`, `output_processor`, `worker` and `sample_tokens` is touched.

A hook looks everything up before it changes anything, passes on whatever it is called with, and
does nothing where it stands already (`wrapping.py`); what it knows of an object of vLLM's lies
beside it. Where a name has moved that serving cannot do without, `--attention-backend toptheta` is
unknown or refused at the start; of all else one line in the log says what is lost.
"""
