// memory3_kernels._direct: calls the CPU kernels without torch's dispatcher.
//
// The dispatcher turns every argument into an IValue and that into a StableIValue, one allocation each; here a tensor is
// read in place through DLPack's exchange table. Whatever is not plain (a gradient, a mode, another device, a subclass, a
// number where a tensor should stand, an error in the kernel) returns NotImplemented: the caller then takes the
// dispatcher, which does it or says what is wrong. Limited API: one module for all versions of Python.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

#include <initializer_list>

#include "python/direct.h"

namespace {

using namespace m3;

constexpr char kCapsule[] = "memory3.direct_op";
constexpr Py_ssize_t kMostIntegers = 512;  // in all lists of a call
constexpr Py_ssize_t kMostDtypes = 16;

using Find = const direct::Op* (*)(const char*);

// Set by configure(); objects are never given back.
struct State {
  const dlpack::Exchange* exchange;
  PyObject *tensor, *parameter;  // types
  PyObject* watchers;            // functions; one that returns something true wants the call to go through the dispatcher
  PyObject *is_grad_enabled, *any_requires_grad, *increment_version, *is_inference;
  PyObject* dtypes[kMostDtypes];
  dlpack::Dtype codes[kMostDtypes];
  Py_ssize_t dtype_count;
  Find find;
};
State state;

// What a callable knows of its op; lives as long as the callable: for good.
struct Callable {
  PyMethodDef method;
  const direct::Op* op;
  PyObject* names;   // of all arguments
  PyObject* writes;  // positions of those that the op writes to
};

struct Pool {
  int64_t integers[kMostIntegers];
  Py_ssize_t used = 0;
};

bool read_tensor(PyObject* object, dlpack::Tensor& to) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != state.tensor && type != state.parameter) return false;  // subclasses may want the call for themselves
  return state.exchange->tensor_from_object(object, &to) == 0 && to.device.type == dlpack::kCpu;
}

bool read_integer(PyObject* object, int64_t& to) {
  if (!PyLong_CheckExact(object)) return false;
  to = PyLong_AsLongLong(object);
  return to != -1 || !PyErr_Occurred();
}

bool read_integers(PyObject* list, direct::Value& to, Pool& pool) {
  if (!PyList_CheckExact(list) && !PyTuple_CheckExact(list)) return false;
  const bool is_list = PyList_CheckExact(list);
  const Py_ssize_t count = is_list ? PyList_Size(list) : PyTuple_Size(list);
  if (count > kMostIntegers - pool.used) return false;
  int64_t* at = pool.integers + pool.used;
  to.integers = at, to.count = static_cast<size_t>(count);
  pool.used += count;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!read_integer(is_list ? PyList_GetItem(list, i) : PyTuple_GetItem(list, i), at[i])) return false;
  return true;
}

bool read(direct::Kind kind, PyObject* object, direct::Value& to, Pool& pool) {
  switch (kind) {
    case direct::Kind::kTensor: return read_tensor(object, to.tensor);
    case direct::Kind::kMaybeTensor:
      to.integer = object != Py_None;
      return object == Py_None || read_tensor(object, to.tensor);
    case direct::Kind::kNumber:
      if (!PyFloat_CheckExact(object)) return false;
      to.number = PyFloat_AsDouble(object);
      return true;
    case direct::Kind::kInteger: return read_integer(object, to.integer);
    case direct::Kind::kBoolean:
      to.integer = object == Py_True;
      return object == Py_True || object == Py_False;
    case direct::Kind::kDtype:
      for (Py_ssize_t i = 0; i < state.dtype_count; ++i)
        if (state.dtypes[i] == object) return to.dtype = state.codes[i], true;
      return false;
    case direct::Kind::kText: {
      if (!PyUnicode_CheckExact(object)) return false;
      Py_ssize_t size = 0;
      to.text = PyUnicode_AsUTF8AndSize(object, &size);
      to.count = static_cast<size_t>(size);
      return to.text != nullptr;
    }
    case direct::Kind::kIntegers: return read_integers(object, to, pool);
  }
  return false;
}

PyObject* not_direct() {
  PyErr_Clear();
  return Py_NewRef(Py_NotImplemented);
}

PyObject* object_of(dlpack::Managed* block) {
  void* made = nullptr;
  return state.exchange->object_from_managed(block, &made) == 0 ? static_cast<PyObject*>(made) : nullptr;
}

PyObject* objects_of(dlpack::Managed** blocks, int32_t count) {
  if (count == 0) return Py_NewRef(Py_None);
  if (count == 1) return object_of(blocks[0]);
  PyObject* tuple = PyTuple_New(count);
  for (int32_t i = 0; i < count; ++i) {
    PyObject* made = tuple ? object_of(blocks[i]) : nullptr;
    if (made) {
      PyTuple_SetItem(tuple, i, made);
      continue;
    }
    for (int32_t rest = tuple ? i + 1 : i; rest < count; ++rest) blocks[rest]->deleter(blocks[rest]);
    Py_XDECREF(tuple);
    return nullptr;
  }
  return tuple;
}

// Calls function() and says whether the answer is true; an error counts as one.
bool holds(PyObject* function) {
  PyObject* answer = PyObject_CallNoArgs(function);
  if (answer == Py_None || answer == Py_False) return Py_DECREF(answer), false;
  const bool is_true = !answer || PyObject_IsTrue(answer) != 0;
  Py_XDECREF(answer);
  return is_true;
}

bool wants_gradient(PyObject* const* args, Py_ssize_t count) {
  if (!holds(state.is_grad_enabled)) return false;
  PyObject* tuple = PyTuple_New(count);
  if (!tuple) return true;
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SetItem(tuple, i, Py_NewRef(args[i]));
  PyObject* answer = PyObject_CallObject(state.any_requires_grad, tuple);
  Py_DECREF(tuple);
  Py_XDECREF(answer);
  return answer != Py_False;
}

bool is_watched() {
  const Py_ssize_t count = PyTuple_Size(state.watchers);
  for (Py_ssize_t i = 0; i < count; ++i)
    if (holds(PyTuple_GetItem(state.watchers, i))) return true;
  return false;
}

// Counts a version of what is written to: autograd then notices a saved tensor that has changed.
bool count_version(PyObject* tensor) {
  PyObject* inference = PyObject_CallFunctionObjArgs(state.is_inference, tensor, nullptr);
  Py_XDECREF(inference);
  if (inference != Py_False) return inference == Py_True;
  PyObject* one = PyTuple_Pack(1, tensor);
  PyObject* done = one ? PyObject_CallFunctionObjArgs(state.increment_version, one, nullptr) : nullptr;
  Py_XDECREF(one);
  Py_XDECREF(done);
  return done != nullptr;
}

// As the public functions call: all arguments, those behind the positional ones named in the schema's order.
bool in_order(const Callable& callable, Py_ssize_t count, PyObject* keywords) {
  const Py_ssize_t named = keywords ? PyTuple_Size(keywords) : 0;
  if (count + named != callable.op->inputs) return false;
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject *given = PyTuple_GetItem(keywords, i), *name = PyTuple_GetItem(callable.names, count + i);
    if (given != name && PyUnicode_Compare(given, name) != 0) return false;  // both are interned nearly always
  }
  return true;
}

PyObject* call(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* keywords) {
  const auto* callable = static_cast<const Callable*>(PyCapsule_GetPointer(self, kCapsule));
  if (!callable) return nullptr;
  const direct::Op* op = callable->op;
  if (!in_order(*callable, count, keywords) || wants_gradient(args, op->inputs) || is_watched()) return not_direct();
  direct::Value values[direct::kMostInputs];
  Pool pool;
  for (int32_t i = 0; i < op->inputs; ++i)
    if (!read(op->kinds[i], args[i], values[i], pool)) return not_direct();
  for (Py_ssize_t i = 0; i < PyTuple_Size(callable->writes); ++i)
    if (!count_version(args[PyLong_AsSsize_t(PyTuple_GetItem(callable->writes, i))])) return nullptr;
  dlpack::Managed* results[direct::kMostOutputs];
  PyThreadState* thread = PyEval_SaveThread();
  const bool done = op->call(values, results);
  PyEval_RestoreThread(thread);
  return done ? objects_of(results, op->outputs) : not_direct();
}

// configure(exchange, types, watchers, functions, samples, find): the table of torch.Tensor; (Tensor, Parameter); functions
// that say who watches; (is_grad_enabled, any_requires_grad, increment_version, is_inference); a tensor of every dtype
// that ops are given by name; the address of the binding's m3_direct_op.
PyObject* configure(PyObject*, PyObject* args) {
  State next{};
  PyObject *capsule, *samples;
  unsigned long long address;
  if (!PyArg_ParseTuple(args, "O(OO)O!(OOOO)O!K:configure", &capsule, &next.tensor, &next.parameter, &PyTuple_Type,
                        &next.watchers, &next.is_grad_enabled, &next.any_requires_grad, &next.increment_version,
                        &next.is_inference, &PyTuple_Type, &samples, &address))
    return nullptr;
  next.find = reinterpret_cast<Find>(static_cast<uintptr_t>(address));
  next.exchange = static_cast<const dlpack::Exchange*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!next.exchange) return nullptr;
  next.dtype_count = PyTuple_Size(samples);
  if (next.exchange->version.major != 1 || !next.exchange->tensor_from_object || next.dtype_count > kMostDtypes) {
    PyErr_Format(PyExc_RuntimeError, "DLPack's exchange table: expected version 1 with borrowed tensors, got version %u",
                 next.exchange->version.major);
    return nullptr;
  }
  for (Py_ssize_t i = 0; i < next.dtype_count; ++i) {
    PyObject* sample = PyTuple_GetItem(samples, i);
    dlpack::Tensor seen;
    next.dtypes[i] = PyObject_GetAttrString(sample, "dtype");
    if (!next.dtypes[i] || next.exchange->tensor_from_object(sample, &seen)) return nullptr;
    next.codes[i] = seen.dtype;
  }
  for (PyObject* kept : {next.tensor, next.parameter, next.watchers, next.is_grad_enabled, next.any_requires_grad,
                         next.increment_version, next.is_inference})
    Py_INCREF(kept);
  state = next;
  return Py_NewRef(Py_None);
}

// op(name, names, writes): the callable; None where there is none. names: of all arguments; writes: positions of those
// that it writes to.
PyObject* find_op(PyObject*, PyObject* args) {
  const char* name;
  PyObject *names, *writes;
  if (!PyArg_ParseTuple(args, "sO!O!:op", &name, &PyTuple_Type, &names, &PyTuple_Type, &writes)) return nullptr;
  const direct::Op* op = state.exchange ? state.find(name) : nullptr;
  if (!op || op->abi != direct::kAbi || PyTuple_Size(names) != op->inputs) return Py_NewRef(Py_None);
  auto* callable = new Callable{{op->name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                                 METH_FASTCALL | METH_KEYWORDS, nullptr},
                                op, Py_NewRef(names), Py_NewRef(writes)};
  PyObject* self = PyCapsule_New(callable, kCapsule, nullptr);
  if (!self) return nullptr;
  PyObject* made = PyCFunction_NewEx(&callable->method, self, nullptr);
  Py_DECREF(self);
  return made;
}

PyMethodDef methods[] = {{"configure", configure, METH_VARARGS, nullptr},
                         {"op", find_op, METH_VARARGS, nullptr},
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef module = {PyModuleDef_HEAD_INIT, "_direct", "Calls of CPU kernels beside torch's dispatcher.", -1, methods,
                      nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__direct() { return PyModule_Create(&module); }
