// The CUDA launchers of csrc/, compiled for the CPU by the header cuda_on_cpu.h and offered to Python.
//
// Arrays are numpy's; a half-precision tensor is passed as its uint16 bits. Pointers go to the launchers as they
// are, so a view with an odd offset is a misaligned tensor, and an access outside an array is AddressSanitizer's.
#include "cuda_on_cpu.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "residual_srelu_cuda.cu"
#include "srelu_cuda.cu"

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

Parameter parameter(const py::array& array, const std::string& dtype) { return {array.data(), dtype_of(dtype)}; }

// Exactly as long as the launcher asks for, on 16 bytes as operator new gives it.
using Workspace = std::unique_ptr<unsigned char[]>;
Workspace workspace(int64_t bytes) { return Workspace(new unsigned char[bytes]); }

}  // namespace

PYBIND11_MODULE(EMULATOR_MODULE, m) {
  using Sizes = std::array<int64_t, 3>;
  using Name = const std::string&;
  m.def("srelu", [](Name dtype, Sizes extent, py::array x, py::array bias, Name bias_dtype, py::array y) {
    check(cuda::srelu_forward(
        {dtype_of(dtype), extent_of(extent), x.data(), parameter(bias, bias_dtype), y.mutable_data()}, nullptr));
  });
  m.def("srelu_backward", [](Name dtype, Sizes extent, py::array grad_output, py::array output, py::array bias,
                             Name bias_dtype, py::array grad_x, py::array grad_bias) {
    const SReLUBackwardArgs args{
        dtype_of(dtype), extent_of(extent), grad_output.data(), output.data(), parameter(bias, bias_dtype),
        grad_x.mutable_data(), grad_bias.mutable_data()};
    const int64_t bytes = cuda::srelu_backward_workspace(args);
    const Workspace partials = workspace(bytes);
    check(cuda::srelu_backward(args, partials.get(), nullptr));
    return bytes;
  });
  m.def("residual_srelu", [](Name dtype, Sizes extent, py::array shortcut, py::array branch, py::array bias,
                             Name bias_dtype, std::optional<py::array> scale, Name scale_dtype, py::array y) {
    const Parameter s = scale ? parameter(*scale, scale_dtype) : Parameter{};
    check(cuda::residual_srelu_forward({dtype_of(dtype), extent_of(extent), shortcut.data(), branch.data(),
                                        parameter(bias, bias_dtype), s, y.mutable_data()},
                                       nullptr));
  });
  m.def("residual_srelu_backward", [](Name dtype, Sizes extent, py::array grad_output, py::array output,
                                      py::array branch, py::array bias, Name bias_dtype, py::array scale,
                                      Name scale_dtype, py::array grad_shortcut, py::array grad_branch,
                                      py::array grad_bias, py::array grad_scale) {
    const ResidualSReLUBackwardArgs args{
        dtype_of(dtype), extent_of(extent), grad_output.data(), output.data(), branch.data(),
        parameter(bias, bias_dtype), parameter(scale, scale_dtype), grad_shortcut.mutable_data(),
        grad_branch.mutable_data(), grad_bias.mutable_data(), grad_scale.mutable_data()};
    const int64_t bytes = cuda::residual_srelu_backward_workspace(args);
    const Workspace partials = workspace(bytes);
    check(cuda::residual_srelu_backward(args, partials.get(), nullptr));
    return bytes;
  });
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
