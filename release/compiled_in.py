"""Add to a CycloneDX bill of materials what a wheel's extension was compiled with.

    python release/compiled_in.py BILL.json WHEEL > COMPLETE.json

No environment lists that. The wheel holds no shared libraries of others: pybind11 is headers, and the CUDA
run-time, where the CUDA part was built, is linked statically.
"""

import json
import sys
import zipfile

bill_path, wheel_path = sys.argv[1:]
with open(bill_path, encoding="utf-8") as file:
    bill = json.load(file)
with zipfile.ZipFile(wheel_path) as wheel:
    extensions = [wheel.read(name) for name in wheel.namelist() if name.endswith(".so")]
    assert not [name for name in wheel.namelist() if ".libs/" in name], "a shared library was grafted in"
(extension,) = extensions
bill["metadata"]["component"]["version"] = wheel_path.rpartition("/")[2].split("-")[1]
added = [("pybind11", {"expression": "BSD-3-Clause"})]
if b"cudaLaunchKernel" in extension:
    added.append(("cuda-cudart (static)", {"license": {"name": "NVIDIA CUDA Toolkit EULA"}}))
for name, licence in added:
    component = {"type": "library", "bom-ref": f"compiled-in:{name}", "name": name, "licenses": [licence]}
    bill["components"].append(component)
json.dump(bill, sys.stdout, indent=2, sort_keys=True)
print()
