//! AMX in software, for tests on machines without it: a handler of the illegal-instruction signal decodes the few tile
//! instructions that `amx.rs` uses, carries them out on memory, and steps over them.
//!
//! So the tests run the very machine code that a Sapphire Rapids runs. Semantics after Intel's "Architecture Instruction
//! Set Extensions Programming Reference", chapter 3: `TDPBF16PS` takes denormals as zero and adds the product of the
//! lower halves first.

use std::cell::RefCell;
use std::sync::Once;

/// 16 rows of 64 bytes.
type Tile = [[u32; 16]; 16];

/// One thread's tile registers.
struct Unit {
    tiles: [Tile; 8],
    configured: bool,
}

thread_local! {
    static UNIT: RefCell<Unit> = const { RefCell::new(Unit { tiles: [[[0; 16]; 16]; 8], configured: false }) };
}

/// Takes over illegal instructions of this process; once.
pub(super) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the action is zeroed and filled as sigaction wants it; the handler has the signature of SA_SIGINFO.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            assert_eq!(libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()), 0);
        }
    });
}

/// Numbers of `gregs` in the order of the encoding: rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8 .. r15.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel hands a ucontext_t; rip points at the instruction, which is at least 5 bytes of mapped code and
    // is read only as far as its own encoding goes.
    unsafe {
        let gregs = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let code = gregs[libc::REG_RIP as usize] as *const u8;
        match step(code, gregs) {
            Some(length) => gregs[libc::REG_RIP as usize] += length,
            // Not ours: die as without a handler.
            None => {
                libc::signal(libc::SIGILL, libc::SIG_DFL);
            }
        }
    }
}

/// Carries out one tile instruction and returns its length.
///
/// All of them are VEX.128.0F38 with three bytes of prefix: `C4, RXB.00010, W.vvvv.L.pp, opcode, ModRM [SIB [disp]]`.
unsafe fn step(code: *const u8, gregs: &[libc::greg_t; 23]) -> Option<i64> {
    // SAFETY: see `handler`.
    let at = |i: usize| unsafe { *code.add(i) };
    if at(0) != 0xC4 || at(1) & 0x1F != 2 {
        return None;
    }
    let (inverted_x, inverted_b) = (at(1) >> 6 & 1, at(1) >> 5 & 1);
    let (prefix, opcode, modrm) = (at(2) & 3, at(3), at(4));
    let vvvv = usize::from(!(at(2) >> 3) & 15);
    let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
    let register = |number: usize| gregs[GREGS[number] as usize] as usize;
    UNIT.with_borrow_mut(|unit| {
        if mode == 3 {
            match (prefix, opcode) {
                (0, 0x49) if modrm == 0xC0 => unit.configured = false, // tilerelease
                (3, 0x49) => unit.tiles[reg] = [[0; 16]; 16],          // tilezero
                (2, 0x5C) => {
                    assert!(unit.configured, "tdpbf16ps before ldtilecfg");
                    let (a, b) = (unit.tiles[rm], unit.tiles[vvvv]);
                    multiply(&mut unit.tiles[reg], &a, &b);
                }
                _ => return None,
            }
            return Some(5);
        }
        // Memory operand: base (or base + index) and an optional displacement.
        let mut length = 5;
        let (base, index) = if rm == 4 {
            let sib = at(5);
            length += 1;
            let index = usize::from(sib >> 3 & 7) + 8 * usize::from(1 - inverted_x);
            assert!(sib >> 6 == 0 && index != 4, "a stride is an index times one");
            (usize::from(sib & 7) + 8 * usize::from(1 - inverted_b), Some(register(index)))
        } else {
            (rm + 8 * usize::from(1 - inverted_b), None)
        };
        let displacement = match mode {
            0 if base % 8 == 5 => return None,
            0 => 0,
            1 => i64::from(at(length).cast_signed()),
            _ => i64::from(i32::from_le_bytes([at(length), at(length + 1), at(length + 2), at(length + 3)])),
        };
        length += [0, 1, 4][usize::from(mode)];
        let address = (register(base) as i64 + displacement) as usize;
        match (prefix, opcode, index) {
            (0, 0x49, None) => {
                // ldtilecfg: palette 1 and the shapes that `amx.rs` uses.
                // SAFETY: the operand is 64 bytes of configuration.
                let config = unsafe { std::slice::from_raw_parts(address as *const u8, 64) };
                assert!(config[0] == 1 && config[16..32].chunks(2).all(|bytes| bytes == [64, 0]), "row bytes");
                assert!(config[48..56].iter().all(|rows| *rows == 16), "rows");
                unit.configured = true;
            }
            // tileloadd, tileloaddt1
            (1 | 3, 0x4B, Some(stride)) => {
                assert!(unit.configured, "tileloadd before ldtilecfg");
                for (r, row) in unit.tiles[reg].iter_mut().enumerate() {
                    // SAFETY: what the instruction itself would read.
                    *row = unsafe { std::ptr::read_unaligned((address + r * stride) as *const [u32; 16]) };
                }
            }
            (2, 0x4B, Some(stride)) => {
                for (r, row) in unit.tiles[reg].iter().enumerate() {
                    // SAFETY: what the instruction itself would write.
                    unsafe { std::ptr::write_unaligned((address + r * stride) as *mut [u32; 16], *row) };
                }
            }
            _ => return None,
        }
        Some(length as i64)
    })
}

/// The f32 of a bf16, denormals as zero.
fn widen(half: u32) -> f32 {
    let value = f32::from_bits(half << 16);
    if value.is_subnormal() { 0.0 } else { value }
}

fn multiply(c: &mut Tile, a: &Tile, b: &Tile) {
    for (row, a) in c.iter_mut().zip(a) {
        for (n, out) in row.iter_mut().enumerate() {
            let mut sum = f32::from_bits(*out);
            for (k, word) in a.iter().enumerate() {
                sum += widen(word & 0xFFFF) * widen(b[k][n] & 0xFFFF);
                sum += widen(word >> 16) * widen(b[k][n] >> 16);
            }
            *out = sum.to_bits();
        }
    }
}
