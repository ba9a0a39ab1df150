"""llama.cpp's decode loop, run by an interpreter that has llama-cpp-python: one JSON request per line of its input.

    python llama_loop.py MODEL.gguf THREADS CONTEXT
    {"ids": [...], "new": 128}  ->  {"prefill_s": ..., "decode_s": ..., "ids": [...]}

Greedy, through the C functions (their Python wrapper copies logits and sorts candidates at every token, which is not
llama.cpp's time). Imports nothing of this project: the interpreter need not have it.
"""

import ctypes
import json
import sys
import time

import llama_cpp
import numpy as np


def main(path: str, threads: int, context: int) -> None:
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = context
    params.n_threads = params.n_threads_batch = threads
    handle = llama_cpp.llama_init_from_model(model, params)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def take(ids: list[int]) -> int:
        """Runs tokens; the most likely next one."""
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if llama_cpp.llama_decode(handle, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode failed on {len(ids)} tokens")
        logits = llama_cpp.llama_get_logits_ith(handle, -1)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (words,)).argmax())

    about = {"version": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
        begin = time.perf_counter()
        found = [take(request["ids"])]
        middle = time.perf_counter()
        while len(found) < request["new"]:
            found.append(take(found[-1:]))
        end = time.perf_counter()
        print(json.dumps({"prefill_s": middle - begin, "decode_s": end - middle, "ids": found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
