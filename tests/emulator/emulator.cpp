// The CUDA kernels of csrc/, compiled for the CPU by the header cuda_on_cpu.h, offered to Python.
//
// Arrays are numpy's; a half-precision tensor is passed as its uint16 bits. Pointers go to the launchers as they
// are, so a view with an odd offset is a misaligned tensor, and an access outside an array is AddressSanitizer's.
#include "cuda_on_cpu.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "call.h"
#include "partition.h"
#include "residual_srelu.h"
#include "srelu.h"

namespace py = pybind11;
using namespace isonet_fast;

namespace {

DType dtype_of(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float64") return DType::float64;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("unknown dtype " + name);
}

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error("launcher returned error " + std::to_string(error));
}

Extent extent_of(const std::array<int64_t, 3>& sizes) { return {sizes[0], sizes[1], sizes[2]}; }

// m.name(...) launches the kernels of a formula, and returns the bytes of workspace that they asked for.
template <class Formula>
void offer(py::module_& m, const char* name) {
  using Arrays = std::vector<py::array>;
  using Optional = std::optional<py::array>;
  const auto run = [](const std::string& dtype, const std::array<int64_t, 3>& extent, const Arrays& in, Arrays out,
                      const py::array& bias, const std::string& parameter_dtype, const Optional& scale,
                      Optional grad_bias, Optional grad_scale) {
    const DType parameters = dtype_of(parameter_dtype);
    Call call{.dtype = dtype_of(dtype), .extent = extent_of(extent), .bias = {bias.data(), parameters}};
    for (int k = 0; k < Formula::kReads; ++k) call.in[k] = in.at(k).data();
    for (int k = 0; k < Formula::kWrites; ++k) call.out[k] = out.at(k).mutable_data();
    if (scale) call.scale = {scale->data(), parameters};
    if (grad_bias) call.grad_bias = grad_bias->mutable_data();
    if (grad_scale) call.grad_scale = grad_scale->mutable_data();
    int64_t bytes = 0;
    if constexpr (Formula::kSumsBias) bytes = cuda::workspace_bytes<Formula>(call);
    // Exactly as long as the launcher asks for, on 16 bytes as operator new gives it.
    const std::unique_ptr<unsigned char[]> workspace(new unsigned char[bytes]);
    check(cuda::launch<Formula>(call, workspace.get(), nullptr));
    return bytes;
  };
  m.def(name, run, py::arg("dtype"), py::arg("extent"), py::arg("reads"), py::arg("writes"), py::arg("bias"),
        py::arg("parameter_dtype"), py::arg("scale") = py::none(), py::arg("grad_bias") = py::none(),
        py::arg("grad_scale") = py::none());
}

}  // namespace

PYBIND11_MODULE(emulator, m) {
  offer<SReLUForward>(m, "srelu");
  offer<SReLUBackward>(m, "srelu_backward");
  offer<ResidualSReLUForward>(m, "residual_srelu");
  offer<ResidualSReLUBackward>(m, "residual_srelu_backward");
  m.def("set_blocks", [](unsigned blocks) { emulator::blocks = blocks; });
  m.def("set_order", [](int order) { emulator::order = order; });
  // What the kernels read and wrote since the last call, and the number of launches.
  m.def("traffic", [] {
    py::dict d;
    d["read"] = emulator::bytes.read;
    d["written"] = emulator::bytes.written;
    d["parameters"] = emulator::bytes.parameters;
    d["partials_written"] = emulator::bytes.partials_written;
    d["partials_read"] = emulator::bytes.partials_read;
    d["launches"] = emulator::launches;
    emulator::bytes = {};
    emulator::launches = 0;
    return d;
  });
  // How the launchers would cut a tensor, of any size.
  m.def("partition", [](std::array<int64_t, 3> extent, int vector, bool sums) {
    const Partition p = make_partition(extent_of(extent), vector, sums);
    py::dict d;
    d["planes"] = p.planes;
    d["columns"] = p.columns;
    d["length"] = p.length;
    d["span"] = p.span;
    d["splits"] = p.splits;
    d["tiles"] = p.tiles;
    d["tile_columns"] = p.tile_columns;
    d["tile_rows"] = p.tile_rows;
    d["threads"] = p.threads;
    d["slots"] = p.slots;
    d["shared_values"] = p.shared_values();
    return d;
  });
  m.def("divide", [](int64_t n, int64_t divisor) { return Divide(divisor)(n); });
}
