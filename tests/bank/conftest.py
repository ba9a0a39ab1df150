import pytest


@pytest.fixture(autouse=True)
def one_thread():
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
