// Poplar's description of a device.
#pragma once

namespace poplar {

enum class TargetType { IPU, IPU_MODEL, CPU };

class Target {
 public:
  Target(unsigned tiles, unsigned bytes) : tiles_(tiles), bytes_(bytes) {}
  unsigned getNumTiles() const { return tiles_; }
  unsigned getBytesPerTile() const { return bytes_; }
  unsigned getNumWorkerContexts() const { return 6; }
  TargetType getTargetType() const { return TargetType::IPU; }

 private:
  unsigned tiles_, bytes_;
};

}  // namespace poplar
