// What a cosine is at the edges of float32.
#pragma once

namespace vtk {

// A squared norm outside [kMinSquaredNorm, inf) has no float32 cosine: below, the token counts as a zero vector
// (similarity 0 with everything); infinite or NaN, the token ranks last.
inline constexpr float kMinSquaredNorm = 1.17549435e-38f;

}  // namespace vtk
