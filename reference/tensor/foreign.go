package tensor

import (
	"encoding/binary"
	"strings"
)

// Beginnings of files of other kinds that get a name ending in .safetensors or
// .npz by mistake. Python's pickle starts with the opcode PROTO and a version,
// since version 2. Source: the documentation of CPython's pickletools; PKWARE's
// description of the zip format.
const (
	zipMagic     = "PK\x03\x04"
	pickleOpcode = 0x80
	// zipNameAt is where a zip file has its first entry's name, and 4 bytes before,
	// in 2, the name's length.
	zipNameAt = 30
	// torchPickle ends the name of the first entry of what torch.save writes.
	torchPickle = "data.pkl"
)

const (
	isTorch  = "it is a file of torch.save (.pt, .pth, .bin): load it with torch.load and save its tensors with safetensors.torch.save_file"
	isPickle = "it is a Python pickle, as old versions of torch.save write it: load it where it was made and save its tensors with safetensors.torch.save_file or safetensors.numpy.save_file"
	isNPY    = "it is one NumPy array (.npy): load it with numpy.load and save all tensors by name with safetensors.numpy.save_file"
	isNPZ    = "it is NumPy's .npz: name it so if it holds taps, or load it with numpy.load and save its tensors with safetensors.numpy.save_file"
	isZip    = "it is a zip file: unpack it"
	isSafe   = "it looks like a safetensors file: let its name end in .safetensors"
)

// foreign says what kind of file, other than safetensors, starts like that and
// what to do about it; empty if it is none that is known.
func foreign(start []byte) string {
	text := string(start[:min(len(start), 1<<10)])
	switch {
	case strings.HasPrefix(text, npyMagic):
		return isNPY
	case strings.HasPrefix(text, zipMagic):
		name := firstZipName(text)
		switch {
		case strings.HasSuffix(name, torchPickle):
			return isTorch
		case strings.HasSuffix(name, ".npy"):
			return isNPZ
		}
		return isZip
	case len(text) >= 2 && text[0] == pickleOpcode && text[1] >= 2 && text[1] <= 5:
		return isPickle
	}
	return ""
}

// firstZipName is the name of a zip file's first entry, as far as it is there.
func firstZipName(text string) string {
	if len(text) < zipNameAt {
		return ""
	}
	n := int(binary.LittleEndian.Uint16([]byte(text[zipNameAt-4:])))
	return text[zipNameAt:min(len(text), zipNameAt+n)]
}
