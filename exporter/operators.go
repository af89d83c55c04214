package exporter

import (
	"math"
	"slices"
)

// One method for each of ONNX's operators that the exporter uses. Each checks
// types and shapes; the first mistake is the graph's error ([Graph.Err]).

// Identity copies.
func (s *Scope) Identity(v Value) Value { return s.one("Identity", v.typ, v.shape, []Value{v}) }

// Cast converts the element type; floats round to nearest even.
func (s *Scope) Cast(v Value, to Type) Value {
	if v.typ == to {
		return v
	}
	return s.one("Cast", to, v.shape, []Value{v}, attribute{"to", int64(to)})
}

// broadcast returns the shape of an element-wise operator.
func (s *Scope) broadcast(op string, a, b Shape) Shape {
	long, short := a, b
	if len(long) < len(short) {
		long, short = short, long
	}
	shape := slices.Clone(long)
	for i, d := range short {
		j := len(long) - len(short) + i
		switch {
		case shape[j] == d || d == N(1):
		case shape[j] == N(1):
			shape[j] = d
		default:
			s.Fail("%s: shapes %v and %v do not broadcast", op, a, b)
		}
	}
	return shape
}

func (s *Scope) binary(op string, result Type, a, b Value) Value {
	if a.typ != b.typ {
		s.Fail("%s: %v and %v differ in type", op, a.typ, b.typ)
	}
	return s.one(op, result, s.broadcast(op, a.shape, b.shape), []Value{a, b})
}

// Element-wise operators of two values, with broadcasting.
func (s *Scope) Add(a, b Value) Value      { return s.binary("Add", a.typ, a, b) }
func (s *Scope) Subtract(a, b Value) Value { return s.binary("Sub", a.typ, a, b) }
func (s *Scope) Mul(a, b Value) Value      { return s.binary("Mul", a.typ, a, b) }
func (s *Scope) Div(a, b Value) Value      { return s.binary("Div", a.typ, a, b) }
func (s *Scope) Min(a, b Value) Value      { return s.binary("Min", a.typ, a, b) }
func (s *Scope) Max(a, b Value) Value      { return s.binary("Max", a.typ, a, b) }
func (s *Scope) And(a, b Value) Value      { return s.binary("And", Bool, a, b) }
func (s *Scope) Equal(a, b Value) Value    { return s.binary("Equal", Bool, a, b) }
func (s *Scope) Less(a, b Value) Value     { return s.binary("Less", Bool, a, b) }
func (s *Scope) GreaterOrEqual(a, b Value) Value {
	return s.binary("GreaterOrEqual", Bool, a, b)
}

func (s *Scope) unary(op string, v Value) Value { return s.one(op, v.typ, v.shape, []Value{v}) }

// Element-wise functions.
func (s *Scope) Sqrt(v Value) Value       { return s.unary("Sqrt", v) }
func (s *Scope) Reciprocal(v Value) Value { return s.unary("Reciprocal", v) }
func (s *Scope) Exp(v Value) Value        { return s.unary("Exp", v) }
func (s *Scope) Neg(v Value) Value        { return s.unary("Neg", v) }
func (s *Scope) Erf(v Value) Value        { return s.unary("Erf", v) }

// Where picks a where the condition holds, else b.
func (s *Scope) Where(condition, a, b Value) Value {
	if condition.typ != Bool || a.typ != b.typ {
		s.Fail("Where: condition %v, branches %v and %v", condition.typ, a.typ, b.typ)
	}
	shape := s.broadcast("Where", condition.shape, s.broadcast("Where", a.shape, b.shape))
	return s.one("Where", a.typ, shape, []Value{condition, a, b})
}

// Softmax runs over the last axis.
func (s *Scope) Softmax(v Value) Value {
	return s.one("Softmax", v.typ, v.shape, []Value{v}, attribute{"axis", int64(-1)})
}

// axis turns a negative axis into one from the front.
func (s *Scope) axis(op string, v Value, axis int) int {
	if axis < 0 {
		axis += len(v.shape)
	}
	if axis < 0 || axis >= len(v.shape) {
		s.Fail("%s: no axis %d in %v", op, axis, v.shape)
		return 0
	}
	return axis
}

// ReduceMean and ReduceSum go over one axis; keep leaves it as 1.
func (s *Scope) ReduceMean(v Value, axis int, keep bool) Value {
	return s.reduce("ReduceMean", v, axis, keep)
}
func (s *Scope) ReduceSum(v Value, axis int, keep bool) Value {
	return s.reduce("ReduceSum", v, axis, keep)
}
func (s *Scope) ReduceMax(v Value, axis int, keep bool) Value {
	return s.reduce("ReduceMax", v, axis, keep)
}

func (s *Scope) reduce(op string, v Value, axis int, keep bool) Value {
	if len(v.shape) == 0 {
		s.Fail("%s: a scalar has no axes", op)
		return v
	}
	axis = s.axis(op, v, axis)
	shape := slices.Clone(v.shape)
	kept := int64(0)
	if keep {
		shape[axis], kept = N(1), 1
	} else {
		shape = slices.Delete(shape, axis, axis+1)
	}
	return s.one(op, v.typ, shape, []Value{v, s.Int64s(axis)}, attribute{"keepdims", kept})
}

// MatMul multiplies the last two axes; earlier ones broadcast.
func (s *Scope) MatMul(a, b Value) Value {
	if len(a.shape) < 2 || len(b.shape) < 2 || a.shape[len(a.shape)-1] != b.shape[len(b.shape)-2] || a.typ != b.typ {
		s.Fail("MatMul: %v %v by %v %v", a.typ, a.shape, b.typ, b.shape)
		return a
	}
	lead := s.broadcast("MatMul", a.shape[:len(a.shape)-2], b.shape[:len(b.shape)-2])
	shape := append(slices.Clone(lead), a.shape[len(a.shape)-2], b.shape[len(b.shape)-1])
	return s.one("MatMul", a.typ, shape, []Value{a, b})
}

// Gemm is x·wᵀ + bias for x [rows, in], w [out, in] and bias [out], which may be
// left out. It takes a weight the way that checkpoints store it.
func (s *Scope) Gemm(x, w, bias Value) Value {
	if len(x.shape) != 2 || len(w.shape) != 2 || x.shape[1] != w.shape[1] || x.typ != w.typ {
		s.Fail("Gemm: %v %v by the transpose of %v %v", x.typ, x.shape, w.typ, w.shape)
		return x
	}
	inputs := []Value{x, w}
	if bias.edge != nil {
		if bias.typ != x.typ || !slices.Equal(bias.shape, w.shape[:1]) {
			s.Fail("Gemm: bias %v %v for %v outputs", bias.typ, bias.shape, w.shape[0])
		}
		inputs = append(inputs, bias)
	}
	return s.one("Gemm", x.typ, Shape{x.shape[0], w.shape[0]}, inputs, attribute{"transB", int64(1)})
}

// Transpose permutes the axes.
func (s *Scope) Transpose(v Value, order ...int) Value {
	shape := make(Shape, len(v.shape))
	perm := make([]int64, len(order))
	if len(order) != len(v.shape) {
		s.Fail("Transpose: order %v for %v", order, v.shape)
		return v
	}
	for i, axis := range order {
		shape[i], perm[i] = v.shape[s.axis("Transpose", v, axis)], int64(axis)
	}
	return s.one("Transpose", v.typ, shape, []Value{v}, attribute{"perm", perm})
}

// Reshape changes the shape; at most one dimension of the new one may be a
// symbol, and is computed.
func (s *Scope) Reshape(v Value, shape ...Dim) Value {
	sizes := make([]int, len(shape))
	symbols := 0
	for i, d := range shape {
		sizes[i] = d.Size
		if d.Symbol != "" {
			sizes[i] = -1
			symbols++
		}
	}
	if symbols > 1 {
		s.Fail("Reshape: %v has %d unknown dimensions", shape, symbols)
	}
	if have, want, ok := elements(v.shape, shape); ok && have != want {
		s.Fail("Reshape: %v has %d elements, %v has %d", v.shape, have, Shape(shape), want)
	}
	return s.one("Reshape", v.typ, shape, []Value{v, s.Int64s(sizes...)})
}

// elements counts both shapes where both are known; equal symbols cancel.
func elements(a, b Shape) (int, int, bool) {
	count := func(shape Shape) (int, map[string]int) {
		n, symbols := 1, map[string]int{}
		for _, d := range shape {
			if d.Symbol != "" {
				symbols[d.Symbol]++
			} else {
				n *= d.Size
			}
		}
		return n, symbols
	}
	na, sa := count(a)
	nb, sb := count(b)
	if len(sa) != len(sb) {
		return 0, 0, false
	}
	for symbol, times := range sa {
		if sb[symbol] != times {
			return 0, 0, false
		}
	}
	return na, nb, true
}

// Unsqueeze adds axes of size 1, counted in the result.
func (s *Scope) Unsqueeze(v Value, axes ...int) Value {
	shape := slices.Clone(v.shape)
	for _, axis := range axes {
		if axis < 0 || axis > len(shape) {
			s.Fail("Unsqueeze: axes %v for %v", axes, v.shape)
			return v
		}
		shape = slices.Insert(shape, axis, N(1))
	}
	return s.one("Unsqueeze", v.typ, shape, []Value{v, s.Int64s(axes...)})
}

// Squeeze drops axes of size 1.
func (s *Scope) Squeeze(v Value, axes ...int) Value {
	shape := Shape{}
	for i, d := range v.shape {
		if !slices.Contains(axes, i) {
			shape = append(shape, d)
		} else if d != N(1) {
			s.Fail("Squeeze: axis %d of %v is not 1", i, v.shape)
		}
	}
	return s.one("Squeeze", v.typ, shape, []Value{v, s.Int64s(axes...)})
}

// Slice takes every step-th element of one axis, from start up to end, of which
// the result has size many. End may be math.MaxInt64.
func (s *Scope) Slice(v Value, axis, start, end, step int, size Dim) Value {
	axis = s.axis("Slice", v, axis)
	shape := slices.Clone(v.shape)
	shape[axis] = size
	inputs := []Value{v, s.Int64s(start), s.Int64s(end), s.Int64s(axis)}
	if step != 1 {
		inputs = append(inputs, s.Int64s(step))
	}
	return s.one("Slice", v.typ, shape, inputs)
}

// SliceFrom drops the first elements of one axis; start is an int64 [1] value,
// counted from the end when negative.
func (s *Scope) SliceFrom(v Value, axis int, start Value, size Dim) Value {
	axis = s.axis("Slice", v, axis)
	shape := slices.Clone(v.shape)
	shape[axis] = size
	return s.one("Slice", v.typ, shape, []Value{v, start, s.Int64s(math.MaxInt64), s.Int64s(axis)})
}

// Concat joins along an axis; size is the result's dimension there.
func (s *Scope) Concat(axis int, size Dim, values ...Value) Value {
	axis = s.axis("Concat", values[0], axis)
	shape := slices.Clone(values[0].shape)
	for _, v := range values[1:] {
		for i := range shape {
			if len(v.shape) != len(shape) || v.typ != values[0].typ || i != axis && v.shape[i] != shape[i] {
				s.Fail("Concat on axis %d: %v %v with %v %v", axis, values[0].typ, shape, v.typ, v.shape)
				return values[0]
			}
		}
	}
	shape[axis] = size
	return s.one("Concat", values[0].typ, shape, values, attribute{"axis", int64(axis)})
}

// Gather takes slices of an axis by index; the indices' shape replaces the axis.
func (s *Scope) Gather(v Value, axis int, indices Value) Value {
	axis = s.axis("Gather", v, axis)
	shape := slices.Concat(v.shape[:axis], indices.shape, v.shape[axis+1:])
	return s.one("Gather", v.typ, shape, []Value{v, indices}, attribute{"axis", int64(axis)})
}

// GatherBatched takes v[t, indices[t, j]] for v [T, E, ...] and indices [T, k].
func (s *Scope) GatherBatched(v, indices Value) Value {
	if len(v.shape) < 2 || len(indices.shape) != 2 || v.shape[0] != indices.shape[0] {
		s.Fail("GatherND: %v by %v", v.shape, indices.shape)
		return v
	}
	shape := slices.Concat(indices.shape, v.shape[2:])
	return s.one("GatherND", v.typ, shape, []Value{v, s.Unsqueeze(indices, 2)}, attribute{"batch_dims", int64(1)})
}

// ScatterElements writes updates [T, k] at indices [T, k] along the last axis.
func (s *Scope) ScatterElements(v, indices, updates Value) Value {
	return s.one("ScatterElements", v.typ, v.shape, []Value{v, indices, updates}, attribute{"axis", int64(len(v.shape) - 1)})
}

// ScatterRows overwrites the rows of v [n, width] that rows [r] names by updates [r, width].
func (s *Scope) ScatterRows(v, rows, updates Value) Value {
	if len(v.shape) != 2 || len(updates.shape) != 2 || v.shape[1] != updates.shape[1] || rows.shape[0] != updates.shape[0] {
		s.Fail("ScatterND: %v, rows %v, updates %v", v.shape, rows.shape, updates.shape)
	}
	return s.one("ScatterND", v.typ, v.shape, []Value{v, s.Unsqueeze(rows, 1), updates})
}

// Expand broadcasts to a shape of known sizes.
func (s *Scope) Expand(v Value, sizes ...int) Value {
	return s.one("Expand", v.typ, s.broadcast("Expand", v.shape, Ns(sizes...)), []Value{v, s.Int64s(sizes...)})
}

// ExpandTo broadcasts to a shape that a run knows.
func (s *Scope) ExpandTo(v, shape Value, result Shape) Value {
	return s.one("Expand", v.typ, result, []Value{v, shape})
}

// Zeros makes a float32 tensor of a shape given as an int64 vector.
func (s *Scope) Zeros(shape Value, result Shape) Value {
	zero := &initializer{edge: &edge{typ: Float32, shape: Ns(1)}, source: Bytes(make([]byte, 4))}
	return s.one("ConstantOfShape", Float32, result, []Value{shape}, attribute{"value", zero})
}

// ShapeOf returns the dimensions as an int64 vector.
func (s *Scope) ShapeOf(v Value) Value {
	return s.one("Shape", Int64, Ns(len(v.shape)), []Value{v})
}

// SizeOf returns one dimension as an int64 vector of one element: a constant
// where it is known.
func (s *Scope) SizeOf(v Value, axis int) Value {
	axis = s.axis("Shape", v, axis)
	if d := v.shape[axis]; d.Symbol == "" {
		return s.Int64s(d.Size)
	}
	return s.one("Shape", Int64, Ns(1), []Value{v},
		attribute{"start", int64(axis)}, attribute{"end", int64(axis + 1)})
}

// Range counts from start up to end, both int64 scalars.
func (s *Scope) Range(start, end Value, size Dim) Value {
	return s.one("Range", Int64, Shape{size}, []Value{start, end, s.Int64(1)})
}

// TopK returns the k largest of the last axis, in descending order, ties by the
// lower index, and their int64 indices.
func (s *Scope) TopK(v Value, k int) (values, indices Value) {
	shape := slices.Clone(v.shape)
	shape[len(shape)-1] = N(k)
	out := s.Node("", "TopK", []Value{v, s.Int64s(k)},
		[]attribute{{"axis", int64(-1)}, {"largest", int64(1)}, {"sorted", int64(1)}},
		output(v.typ, shape), output(Int64, shape))
	return out[0], out[1]
}

// Unique returns the distinct elements in ascending order.
func (s *Scope) Unique(v Value, count Dim) Value {
	return s.one("Unique", v.typ, Shape{count}, []Value{v}, attribute{"sorted", int64(1)})
}

// Nonzero returns the positions of the true elements of a vector.
func (s *Scope) Nonzero(v Value, count Dim) Value {
	positions := s.one("NonZero", Int64, Shape{N(1), count}, []Value{v})
	return s.Reshape(positions, count)
}

// Loop runs a body trips times (an int64 scalar) and returns the final states.
// The body gets the iteration number (an int64 scalar) and the states, and
// returns the next ones.
func (s *Scope) Loop(name string, trips Value, states []Value, build func(s *Scope, iteration Value, states []Value) []Value) []Value {
	inner := s.Sub(name)
	inner.body = &body{names: s.body.names, constants: s.body.constants, function: s.body.function}
	declare := func(role string, typ Type, shape Shape) Value {
		v := Value{&edge{name: s.body.unique(join(inner.path, role)), named: true, typ: typ, shape: shape}}
		inner.body.in = append(inner.body.in, v.edge)
		return v
	}
	iteration := declare("iteration", Int64, Shape{})
	condition := declare("condition", Bool, Shape{})
	inputs := make([]Value, len(states))
	for i, state := range states {
		inputs[i] = declare("state", state.typ, state.shape)
	}
	// Constants of a function must stand outside of the loop; see constant.
	outside := s.body.nodes
	results := build(inner, iteration, inputs)
	if s.body.function {
		inner.hoistConstants(s.body, outside)
	}
	if len(results) != len(states) {
		s.Fail("Loop %s returns %d states of %d", name, len(results), len(states))
		return states
	}
	inner.body.out = []*edge{inner.Identity(condition).edge}
	outputs := make([]Value, len(states))
	for i, v := range results {
		if v.typ != states[i].typ || !slices.Equal(v.shape, states[i].shape) {
			s.Fail("Loop %s turns state %d from %v %v into %v %v", name, i, states[i].typ, states[i].shape, v.typ, v.shape)
		}
		inner.body.out = append(inner.body.out, v.edge)
		outputs[i] = output(v.typ, v.shape)
	}
	return s.Node("", "Loop", append([]Value{trips, s.True()}, states...), []attribute{{"body", inner.body}}, outputs...)
}

// hoistConstants moves the constants that a loop inside a function made to the
// function itself, where later nodes outside of the loop may share them.
func (s *Scope) hoistConstants(outer *body, nodes []*node) {
	var constants, rest []*node
	for _, n := range s.body.nodes {
		if n.op == "Constant" {
			constants = append(constants, n)
		} else {
			rest = append(rest, n)
		}
	}
	s.body.nodes = rest
	outer.nodes = append(constants, nodes...)
}
