// fastsae._C: what is not a tensor op. The build's facts come from setup.py as macros.
#include <pybind11/pybind11.h>

#include "cpu.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and processor features of the compiled part of fastsae.";
  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = FASTSAE_VERSION;
        info["torch"] = FASTSAE_TORCH;
#if defined(__clang__)
        info["compiler"] = "clang " __clang_version__;
#else
        info["compiler"] = "gcc " __VERSION__;
#endif
        info["cuda"] = (bool)FASTSAE_CUDA;
        info["archs"] = FASTSAE_ARCHS;
        return info;
      },
      "version, torch (the one built with), compiler, cuda (compiled in), archs (CUDA).");
  m.def(
      "cpu_features",
      [] {
        const fastsae::CpuFeatures cpu = fastsae::cpu_features();
        py::dict features;
        features["avx2"] = cpu.avx2;
        features["avx512"] = cpu.avx512;
        features["avx512_bf16"] = cpu.avx512_bf16;
        features["avx512_vnni"] = cpu.avx512_vnni;
        features["amx_bf16"] = cpu.amx_bf16;
        features["amx"] = cpu.tiles;
        // The ops library holds the choice; it is another shared object, so ask it through torch.
        features["isa"] =
            py::module_::import("torch").attr("ops").attr("fastsae").attr("_get_isa")();
        return features;
      },
      "What the processor and the operating system offer, and under \"isa\" what the ops use.");
}
