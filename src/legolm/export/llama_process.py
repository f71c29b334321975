"""The process in which llama.cpp runs: a program of its own, without legolm, that ends when its input does.

What llama.cpp makes of a file that it does not understand may end the process it runs in. Its one argument is a JSON
object of settings; when the model is loaded its address comes out as a line, `{"address": ...}` or `{"error": ...}`.
"""

import json
import os
import sys

import xllamacpp


def main() -> None:
    """Serve until the input ends."""
    settings = json.loads(sys.argv[1])
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # where llama.cpp may write lines of its own
    params = xllamacpp.CommonParams()
    params.model.path = settings["model"]
    params.n_ctx, params.n_parallel, params.port = settings["context"], settings["parallel"], settings["port"]
    params.hostnames = [settings["host"]]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    params.verbosity, params.warmup, params.fit_params, params.ui = -1, False, False, False
    params.use_jinja, params.model_alias = True, {settings["alias"]}
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in settings["adapters"]]
    # What was read with one adapter is no beginning for another.
    params.cache_prompt, params.cache_ram_mib = not settings["adapters"], 0
    try:
        server = xllamacpp.Server(params)
    except Exception as error:  # whatever it raises: the parent says it
        print(json.dumps({"error": str(error)}), file=out, flush=True)
        os._exit(1)
    print(json.dumps({"address": server.listening_address}), file=out, flush=True)
    sys.stdin.read()
    os._exit(0)  # its threads need not be waited for


if __name__ == "__main__":
    main()
