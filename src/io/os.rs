//! What only the operating system can do: syncing, renaming, memory and disk figures, and the thread pool.
//!
//! Beside `kernels/` and `ops/crew.rs` this is the only home of `unsafe`. Every function has a portable fallback, so that the crate
//! builds everywhere; where a figure cannot be had, the answer is `None`, never a guess.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rayon::ThreadPool;

use crate::error::{Error, Result};

// ---------------------------------------------------------------------------------------------------------------------
// Files
// ---------------------------------------------------------------------------------------------------------------------

/// Reads exactly `buf.len()` bytes at `offset`, without moving a cursor, so that threads may share `file`.
///
/// # Errors
/// The operating system's; [`io::ErrorKind::UnexpectedEof`] when the file ends before.
pub fn read_exact_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::read_exact_at(file, buf, offset)
    }
    #[cfg(not(unix))]
    {
        use std::io::{Read, Seek, SeekFrom};
        let _one_at_a_time = CURSOR.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = file;
        file.seek(SeekFrom::Start(offset))?;
        file.read_exact(buf)
    }
}

/// Writes all of `bytes` at `offset`; the counterpart of [`read_exact_at`].
///
/// # Errors
/// The operating system's.
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }
    #[cfg(not(unix))]
    {
        use std::io::{Seek, SeekFrom, Write};
        let _one_at_a_time = CURSOR.lock().unwrap_or_else(PoisonError::into_inner);
        let mut file = file;
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(bytes)
    }
}

/// Without positioned reads the cursor is shared, so that seek and read must not be torn apart.
#[cfg(not(unix))]
static CURSOR: Mutex<()> = Mutex::new(());

/// Whether an error of `fsync` only says that this file system does not sync (Drive-like and network mounts).
fn sync_is_unsupported(error: &io::Error) -> bool {
    if error.kind() == io::ErrorKind::Unsupported {
        return true;
    }
    #[cfg(unix)]
    {
        // EINVAL: "fd is bound to a special file which does not support synchronization" (fsync(2)).
        matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY))
    }
    #[cfg(not(unix))]
    {
        false
    }
}

/// Brings a file's bytes to the disk. A file system that cannot sync is not an error; a full or failing disk is.
///
/// # Errors
/// The operating system's.
pub fn fsync_file(file: &File) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if sync_is_unsupported(&error) => Ok(()),
        other => other,
    }
}

/// Brings a folder's entries (names created, renamed, removed) to the disk; where folders cannot be synced, does nothing.
///
/// # Errors
/// The operating system's, [`io::ErrorKind::NotFound`] among them.
pub fn fsync_dir(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    {
        match File::open(path)?.sync_all() {
            // Some mounts open folders for reading but refuse to sync them with EACCES, EPERM or EBADF.
            Err(error)
                if sync_is_unsupported(&error)
                    || matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EBADF)) =>
            {
                Ok(())
            }
            other => other,
        }
    }
    #[cfg(not(unix))]
    {
        std::fs::metadata(path).map(|_| ())
    }
}

/// Renames `from` to `to`; a file at `to` is replaced.
///
/// # Errors
/// The operating system's.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)
}

/// Swaps two existing paths in one atomic step. `Ok(false)`: this system or file system has no such step; nothing moved.
///
/// # Errors
/// The operating system's.
pub fn exchange(a: &Path, b: &Path) -> io::Result<bool> {
    #[cfg(target_os = "linux")]
    {
        use std::os::unix::ffi::OsStrExt;
        let a = std::ffi::CString::new(a.as_os_str().as_bytes())?;
        let b = std::ffi::CString::new(b.as_os_str().as_bytes())?;
        // The raw system call: glibc has the wrapper only since 2.28, and wheels reach further back.
        // SAFETY: both pointers are NUL-terminated strings that live until the call returns; it keeps neither.
        let status = unsafe {
            libc::syscall(
                libc::SYS_renameat2,
                libc::AT_FDCWD,
                a.as_ptr(),
                libc::AT_FDCWD,
                b.as_ptr(),
                libc::RENAME_EXCHANGE,
            )
        };
        if status == 0 {
            return Ok(true);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EINVAL | libc::EOPNOTSUPP | libc::EPERM | libc::EACCES) => Ok(false),
            _ => Err(error),
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (a, b);
        Ok(false)
    }
}

/// Bytes an ordinary user may still write on the file system of `path` (which must exist); `None` where it cannot be asked.
pub fn disk_free_bytes(path: &Path) -> Option<u64> {
    #[cfg(unix)]
    {
        use std::os::unix::ffi::OsStrExt;
        let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
        let mut stat = std::mem::MaybeUninit::<libc::statvfs>::zeroed();
        // SAFETY: `path` is NUL-terminated and `stat` is a buffer of the struct's own size; the call keeps neither.
        let status = unsafe { libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) };
        if status != 0 {
            return None;
        }
        // SAFETY: zeroed plain integers are valid, and the call has filled them in.
        let stat = unsafe { stat.assume_init() };
        #[allow(clippy::unnecessary_cast, clippy::useless_conversion, reason = "the fields are u32 on some systems")]
        Some((stat.f_bavail as u64).saturating_mul(stat.f_frsize as u64))
    }
    #[cfg(not(unix))]
    {
        let _ = path;
        None
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Memory
// ---------------------------------------------------------------------------------------------------------------------

/// The most memory this process has had resident, in bytes; `None` where it cannot be asked.
pub fn peak_rss_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        // VmHWM and not getrusage: ru_maxrss survives exec, so a small process started by a big one would look big.
        proc_kib(&std::fs::read_to_string("/proc/self/status").ok()?, "VmHWM:")
    }
    #[cfg(target_os = "macos")]
    {
        let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
        // SAFETY: `usage` is a buffer of the struct's own size; the call does not keep it.
        let status = unsafe { libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()) };
        if status != 0 {
            return None;
        }
        // SAFETY: zeroed plain integers are valid, and the call has filled them in.
        let usage = unsafe { usage.assume_init() };
        u64::try_from(usage.ru_maxrss).ok() // bytes on macOS
    }
    #[cfg(not(any(target_os = "linux", target_os = "macos")))]
    {
        None
    }
}

/// The memory this process has resident now, in bytes; `None` where it cannot be asked.
pub fn rss_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        proc_kib(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
    }
    #[cfg(not(target_os = "linux"))]
    {
        None
    }
}

/// The memory granted to this process: the machine's, or the control group's limit where that is lower, in bytes.
pub fn total_memory_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let machine = proc_kib(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemTotal:")?;
        Some(Cgroups::of_this_process().memory().map_or(machine, |group| machine.min(group.limit)))
    }
    #[cfg(not(target_os = "linux"))]
    {
        None
    }
}

/// The memory this process may still take before the machine swaps or its control group is killed, in bytes.
/// Pages that only cache files count as available. `None` where it cannot be asked.
pub fn available_memory_bytes() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        let machine = proc_kib(&std::fs::read_to_string("/proc/meminfo").ok()?, "MemAvailable:")?;
        Some(Cgroups::of_this_process().memory().map_or(machine, |group| machine.min(group.available)))
    }
    #[cfg(not(target_os = "linux"))]
    {
        None
    }
}

/// Makes the C library return every block of a mebibyte or more to the system as soon as it is freed.
///
/// glibc raises that limit to the size of what was freed before, up to 32 MiB, and keeps what lies below in the arena of
/// whichever thread asked for it: the same training step then peaked at 200 MiB or at 290. Buffers that are used again are
/// kept by [`crate::ops::Pool`].
pub fn return_large_blocks() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        static ONCE: std::sync::Once = std::sync::Once::new();
        ONCE.call_once(|| {
            // SAFETY: a plain call that sets one parameter of the allocator under its own lock; if it is refused, nothing changes.
            unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 20) };
        });
    }
}

/// Asks for large pages under a block of memory that was just allocated and not yet written to.
///
/// A token of decoding reads every weight once, and with pages of 4 KiB it spends a fifth of its time looking them up. Systems
/// that give large pages only to those who ask are the rule ("madvise" in `/sys/kernel/mm/transparent_hugepage/enabled`).
/// What the memory holds never changes, and a refusal costs nothing.
pub fn prefer_large_pages<T>(memory: std::ops::Range<*const T>) {
    #[cfg(target_os = "linux")]
    {
        const LARGE: usize = 2 << 20;
        let (start, end) = (memory.start.addr().next_multiple_of(4096), memory.end.addr() / 4096 * 4096);
        if end.saturating_sub(start) >= LARGE {
            let pages = memory.start.cast::<libc::c_void>().cast_mut().wrapping_byte_add(start - memory.start.addr());
            // SAFETY: the advice changes which pages back the range and never its content; a range that is not the
            // process's is refused.
            unsafe { libc::madvise(pages, end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// `len` zeros, in large pages where the system has them; nothing is written before the caller writes.
pub fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let zeros = vec![T::default(); len];
    prefer_large_pages(zeros.as_ptr_range());
    zeros
}

/// The value of a `Key:   123 kB` line of a /proc file, in bytes.
#[cfg(target_os = "linux")]
fn proc_kib(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// Where this process stands in the control group tree, version 1 or 2.
#[cfg(target_os = "linux")]
struct Cgroups {
    /// `/proc/self/cgroup`: lines of `id:controllers:path`.
    membership: String,
    /// `/sys/fs/cgroup`.
    root: std::path::PathBuf,
}

/// The tightest memory limit on the way from this process's group to the root, in bytes.
#[cfg(target_os = "linux")]
#[derive(Debug, PartialEq, Eq)]
struct CgroupMemory {
    /// The lowest limit of any group on the way.
    limit: u64,
    /// The least that any group on the way still has to give.
    available: u64,
}

#[cfg(target_os = "linux")]
impl Cgroups {
    fn of_this_process() -> Self {
        Self {
            membership: std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default(),
            root: std::path::PathBuf::from("/sys/fs/cgroup"),
        }
    }

    /// The folders from this process's group up to the root of the hierarchy, and whether it is version 2.
    fn memory_folders(&self) -> Vec<(std::path::PathBuf, bool)> {
        let mut folders = Vec::new();
        for line in self.membership.lines() {
            let mut fields = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
            let is_v2 = controllers.is_empty();
            if !is_v2 && !controllers.split(',').any(|name| name == "memory") {
                continue;
            }
            let hierarchy = if is_v2 { self.root.clone() } else { self.root.join("memory") };
            // A container may name a path of the host that it cannot see; its own group is then the hierarchy's root.
            let path = path.trim_start_matches('/');
            let mut relative = Some(Path::new(path));
            while let Some(part) = relative {
                folders.push((hierarchy.join(part), is_v2));
                relative = part.parent();
            }
        }
        folders
    }

    /// `None`: no group on the way has a limit.
    fn memory(&self) -> Option<CgroupMemory> {
        let mut tightest: Option<CgroupMemory> = None;
        for (folder, is_v2) in self.memory_folders() {
            let (limit_file, usage_file, cache_key) = if is_v2 {
                ("memory.max", "memory.current", "inactive_file ")
            } else {
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ")
            };
            let number = |name: &str| std::fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
            // "max" (version 2) does not parse; version 1 writes "no limit" as about 2^63.
            let Some(limit) = number(limit_file).filter(|&bytes| bytes < 1 << 60) else { continue };
            let usage = number(usage_file).unwrap_or(0);
            let cache = std::fs::read_to_string(folder.join("memory.stat"))
                .ok()
                .and_then(|text| text.lines().find_map(|line| line.strip_prefix(cache_key)?.trim().parse::<u64>().ok()))
                .unwrap_or(0);
            let available = limit.saturating_sub(usage.saturating_sub(cache));
            let so_far = tightest.get_or_insert(CgroupMemory { limit, available });
            so_far.limit = so_far.limit.min(limit);
            so_far.available = so_far.available.min(available);
        }
        tightest
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Processes
// ---------------------------------------------------------------------------------------------------------------------

/// Which process this is, in a way that outlives it: a process id alone is used again, soonest inside containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessTag {
    /// The kernel's boot and process-id namespace, hashed: ids can only be compared inside one.
    pub host: u32,
    /// The process id.
    pub pid: u32,
    /// When the process started, in the kernel's ticks since boot; 0 where it cannot be asked.
    pub started: u64,
}

impl ProcessTag {
    /// The running process.
    pub fn current() -> Self {
        let pid = std::process::id();
        Self { host: host_tag(), pid, started: process_start(pid).unwrap_or(0) }
    }

    /// Whether the process is certainly gone: same host, and no process with its id and start time.
    pub fn is_dead(&self) -> bool {
        if self.host != host_tag() || !cfg!(target_os = "linux") {
            return false;
        }
        process_start(self.pid).is_none_or(|started| started != self.started)
    }
}

/// A hash (FNV-1a) of what makes process ids comparable.
fn host_tag() -> u32 {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespace = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let bytes = boot.bytes().chain(namespace.to_string_lossy().into_owned().into_bytes());
    bytes.fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

/// Field 22 of `/proc/<pid>/stat`; `None` when there is no such process.
fn process_start(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // Field 2 is the command in parentheses and may itself hold spaces and parentheses: count from the last one.
    let after_command = &stat[stat.rfind(')')? + 1..];
    after_command.split_whitespace().nth(19)?.parse().ok()
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads
// ---------------------------------------------------------------------------------------------------------------------

/// The CPUs granted to this process, at least 1: its affinity mask and its control group's quota (versions 1 and 2).
pub fn granted_cpus() -> usize {
    // The standard library reads both (documented for Linux on `available_parallelism`), rounding a quota down.
    std::thread::available_parallelism().map_or(1, std::num::NonZero::get)
}

/// The thread pool of one process. A forked child gets a new one, and the parent's is never touched again: its
/// threads do not exist in the child, and its locks may be held by them.
struct PoolSlot {
    pid: u32,
    is_forked_child: bool,
    state: Mutex<PoolState>,
}

#[derive(Default)]
struct PoolState {
    /// What `set_num_threads` asked for.
    requested: Option<usize>,
    pool: Option<Arc<ThreadPool>>,
}

/// Points to a leaked [`PoolSlot`], or is null before the first use. Slots are never freed (one for each fork).
static SLOT: AtomicPtr<PoolSlot> = AtomicPtr::new(std::ptr::null_mut());

/// This process's slot. No lock is taken before the process is known to own it, so that this is safe after a fork.
fn slot() -> &'static PoolSlot {
    let pid = std::process::id();
    loop {
        let current = SLOT.load(Ordering::Acquire);
        // SAFETY: `SLOT` is null or points to a leaked box, which lives and stays unmoved until the process ends.
        let known = unsafe { current.as_ref() };
        if let Some(slot) = known.filter(|slot| slot.pid == pid) {
            return slot;
        }
        let fresh = Box::new(PoolSlot { pid, is_forked_child: known.is_some(), state: Mutex::default() });
        let fresh = Box::into_raw(fresh);
        if SLOT.compare_exchange(current, fresh, Ordering::AcqRel, Ordering::Acquire).is_err() {
            // SAFETY: `fresh` came from `Box::into_raw` above and was not published, so this is its only owner.
            drop(unsafe { Box::from_raw(fresh) });
        }
    }
}

/// Tells that this process was just forked from one that may have used the pool: from now on it computes on one thread,
/// unless [`set_num_threads`] asks for more. Registered with Python's `os.register_at_fork`; without that call the new
/// process id tells as much, at the first use.
pub fn mark_forked_child() {
    // A process that was forked before the parent ever used the pool has nothing to fear, but is single-threaded, too.
    let fresh = PoolSlot { pid: std::process::id(), is_forked_child: true, state: Mutex::default() };
    SLOT.store(Box::into_raw(Box::new(fresh)), Ordering::Release);
}

/// Sets the number of threads that everything after this call computes with.
///
/// # Errors
/// [`Error::Config`] for 0, and when the system refuses that many threads.
pub fn set_num_threads(n_threads: usize) -> Result<()> {
    if n_threads == 0 {
        return Err(Error::config("num_threads", n_threads, "at least 1"));
    }
    let mut state = slot().state.lock().unwrap_or_else(PoisonError::into_inner);
    // The old pool's threads end when the last computation that holds it is done.
    state.pool = Some(build_pool(n_threads)?);
    state.requested = Some(n_threads);
    Ok(())
}

/// The number of threads computations run on: as set, else `RAYON_NUM_THREADS`, else the CPUs granted; 1 after a fork.
///
/// # Errors
/// [`Error::Config`] when `RAYON_NUM_THREADS` is no number.
pub fn num_threads() -> Result<usize> {
    let slot = slot();
    let requested = slot.state.lock().unwrap_or_else(PoisonError::into_inner).requested;
    resolve_threads(requested, slot.is_forked_child, std::env::var("RAYON_NUM_THREADS").ok().as_deref())
}

/// As written -> as run; `variable` is `RAYON_NUM_THREADS`, where 0 and an empty text mean "as if not set".
fn resolve_threads(requested: Option<usize>, is_forked_child: bool, variable: Option<&str>) -> Result<usize> {
    if let Some(n_threads) = requested {
        return Ok(n_threads);
    }
    if is_forked_child {
        return Ok(1);
    }
    match variable.map(str::trim).filter(|text| !text.is_empty()) {
        Some(text) => match text.parse::<usize>() {
            Ok(0) => Ok(granted_cpus()),
            Ok(n_threads) => Ok(n_threads),
            Err(_) => Err(Error::config("RAYON_NUM_THREADS", text, "a number of threads, or unset the variable")),
        },
        None => Ok(granted_cpus()),
    }
}

fn build_pool(n_threads: usize) -> Result<Arc<ThreadPool>> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(n_threads)
        .thread_name(|index| format!("rustune-{index}"))
        .build()
        .map(Arc::new)
        .map_err(|error| Error::config("num_threads", n_threads, format!("fewer threads; the system says: {error}")))
}

/// The pool all computations of this process share; built at the first use.
///
/// # Errors
/// [`Error::Config`] when `RAYON_NUM_THREADS` is no number, or the system refuses the threads.
pub fn pool() -> Result<Arc<ThreadPool>> {
    let slot = slot();
    let mut state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pool) = &state.pool {
        return Ok(Arc::clone(pool));
    }
    let variable = std::env::var("RAYON_NUM_THREADS").ok();
    let n_threads = resolve_threads(state.requested, slot.is_forked_child, variable.as_deref())?;
    let pool = build_pool(n_threads)?;
    state.pool = Some(Arc::clone(&pool));
    Ok(pool)
}

/// Runs `f` inside [`pool`], so that every rayon call in it uses these threads and never rayon's global pool, which
/// hangs in forked children. Calls may be nested.
///
/// # Errors
/// Those of [`pool`] and of `f`.
pub fn with_pool<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = pool()?;
    let on_foreign_worker = rayon::current_thread_index().is_some() && pool.current_thread_index().is_none();
    if on_foreign_worker && slot().is_forked_child {
        // Forked from inside a computation (a callback that forks): this thread still believes to be a worker of the
        // parent's pool and would wait for its siblings, so it must not wait the rayon way.
        return std::thread::scope(|scope| {
            scope.spawn(|| pool.install(f)).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        });
    }
    pool.install(f)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::print_stdout, reason = "tests")]

    use std::fs;

    use rayon::prelude::*;

    use super::*;

    #[test]
    fn reads_and_writes_at_positions() {
        let folder = tempfile::tempdir().unwrap();
        let file = File::options().read(true).write(true).create_new(true).open(folder.path().join("f")).unwrap();
        write_all_at(&file, b"world", 6).unwrap();
        write_all_at(&file, b"hello ", 0).unwrap();
        fsync_file(&file).unwrap();
        fsync_dir(folder.path()).unwrap();
        let mut buf = [0; 7];
        read_exact_at(&file, &mut buf, 4).unwrap();
        assert_eq!(&buf, b"o world");
        assert_eq!(read_exact_at(&file, &mut buf, 5).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(fsync_dir(&folder.path().join("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn exchanges_folders_where_the_system_can() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a"), folder.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        fs::write(a.join("x"), "from a").unwrap();
        if exchange(&a, &b).unwrap() {
            assert_eq!(fs::read(b.join("x")).unwrap(), b"from a");
            assert_eq!(exchange(&a, &folder.path().join("absent")).unwrap_err().kind(), io::ErrorKind::NotFound);
        } else {
            assert!(a.join("x").exists());
            println!("left out 1 case: this system cannot exchange two paths");
        }
    }

    #[test]
    fn memory_and_disk_figures_are_plausible() {
        let free = disk_free_bytes(Path::new("."));
        assert_eq!(free.is_some(), cfg!(unix));
        assert!(free.is_none_or(|bytes| bytes > 0));
        assert_eq!(disk_free_bytes(Path::new("/no/such/folder")), None);
        if cfg!(target_os = "linux") {
            let total = total_memory_bytes().unwrap();
            assert!(available_memory_bytes().unwrap() <= total);
            let before = peak_rss_bytes().unwrap();
            let block = vec![1_u8; 64 << 20];
            assert!(block.iter().step_by(4096).map(|&byte| usize::from(byte)).sum::<usize>() > 0);
            let peak = peak_rss_bytes().unwrap();
            assert!(peak >= before && peak >= 64 << 20 && peak < total, "{before} {peak} {total}");
            assert!(rss_bytes().unwrap() >= 64 << 20);
            drop(block);
        }
    }

    #[cfg(target_os = "linux")]
    fn group(root: &Path, folder: &str, files: &[(&str, &str)]) {
        let folder = root.join(folder);
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_tightest_control_group_limit_counts() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let of = |membership: &str| {
            Cgroups { membership: membership.to_owned(), root: root.to_owned() }
                .memory()
                .map(|m| (m.limit, m.available))
        };
        assert_eq!(of(""), None);
        assert_eq!(of("0::/a/b\n"), None);

        let stat = "anon 5\ninactive_file 300\nactive_file 7\n";
        group(root, "a", &[("memory.max", "5000\n"), ("memory.current", "1000\n"), ("memory.stat", stat)]);
        group(root, "a/b", &[("memory.max", "max\n"), ("memory.current", "900\n")]);
        assert_eq!(of("0::/a/b\n"), Some((5000, 4300)));
        group(root, "a/b", &[("memory.max", "4000\n"), ("memory.current", "5000\n"), ("memory.stat", "")]);
        assert_eq!(of("0::/a/b\n"), Some((4000, 0)));

        // Version 1; a container sees its own group at the hierarchy's root and not at the path it is told.
        group(root, "memory", &[("memory.limit_in_bytes", "9223372036854771712"), ("memory.usage_in_bytes", "5")]);
        assert_eq!(of("7:cpu:/x\n5:memory:/docker/123\n"), None);
        let stat = "inactive_file 1\ntotal_inactive_file 40\n";
        let files = [("memory.limit_in_bytes", "800"), ("memory.usage_in_bytes", "100"), ("memory.stat", stat)];
        group(root, "memory", &files);
        assert_eq!(of("7:cpu:/x\n5:memory:/docker/123\n"), Some((800, 740)));
    }

    #[test]
    fn a_process_that_ended_is_known_to_be_dead() {
        let this = ProcessTag::current();
        assert!(!this.is_dead());
        if cfg!(target_os = "linux") {
            assert!(ProcessTag { started: this.started + 1, ..this.clone() }.is_dead());
            assert!(!ProcessTag { host: this.host ^ 1, started: 0, ..this.clone() }.is_dead());
            let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
            let tag = ProcessTag { pid: child.id(), started: process_start(child.id()).unwrap(), ..this };
            assert!(!tag.is_dead());
            child.kill().unwrap();
            child.wait().unwrap();
            assert!(tag.is_dead());
        }
    }

    #[test]
    fn the_number_of_threads_is_resolved_once() {
        assert_eq!(resolve_threads(Some(3), true, Some("5")).unwrap(), 3);
        assert_eq!(resolve_threads(None, true, Some("5")).unwrap(), 1);
        assert_eq!(resolve_threads(None, false, Some(" 5 ")).unwrap(), 5);
        let granted = granted_cpus();
        assert!(granted >= 1);
        for unset in [None, Some("0"), Some("")] {
            assert_eq!(resolve_threads(None, false, unset).unwrap(), granted);
        }
        let error = resolve_threads(None, false, Some("many")).unwrap_err().to_string();
        assert!(error.contains("RAYON_NUM_THREADS = many: "), "{error}");
        assert!(set_num_threads(0).is_err());
    }

    /// The tests below change the process's pool, so they take turns.
    static POOL_TESTS: Mutex<()> = Mutex::new(());

    #[test]
    fn work_runs_in_our_pool_nested_or_not() {
        let _turn = POOL_TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        for n_threads in [3, 1, 2] {
            set_num_threads(n_threads).unwrap();
            assert_eq!(num_threads().unwrap(), n_threads);
            let seen =
                with_pool(|| with_pool(|| Ok((rayon::current_num_threads(), pool()?.current_thread_index())))).unwrap();
            assert_eq!(seen.0, n_threads);
            assert!(seen.1.is_some());
        }
        let error = with_pool(|| Err::<(), _>(Error::data("row 1", "is empty"))).unwrap_err();
        assert_eq!(error.to_string(), "row 1: is empty");
    }

    /// The child of a fork, having used no lock the parent's threads may hold, computes with rayon and reports.
    #[cfg(unix)]
    fn in_forked_child(child: impl FnOnce() -> bool) -> bool {
        // SAFETY: the child below touches nothing but this module, rayon through it, and `_exit`.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork failed");
        if pid == 0 {
            let code = i32::from(!std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(false));
            // SAFETY: ends the child at once, without the parent's destructors.
            unsafe { libc::_exit(code) };
        }
        // A child that hangs must fail the test, not hang it: look for its end for up to 20 s, then kill it.
        for _ in 0..2000 {
            let mut status = 0;
            // SAFETY: `pid` is our child and `status` outlives the call.
            let done = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
            if done == pid {
                return libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        // SAFETY: `pid` is our child, not yet waited for.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        false
    }

    #[cfg(unix)]
    fn parallel_sum() -> Result<usize> {
        with_pool(|| Ok((0..10_000_usize).into_par_iter().sum()))
    }

    #[cfg(unix)]
    #[test]
    fn forked_children_compute_on_one_thread_and_never_hang() {
        let _turn = POOL_TESTS.lock().unwrap_or_else(PoisonError::into_inner);
        set_num_threads(4).unwrap();
        let expected = parallel_sum().unwrap();
        // Another thread holds the parent's lock at the moment of the fork, as may happen to any program.
        for is_marked in [true, false] {
            let held = slot().state.lock().unwrap();
            assert!(in_forked_child(|| {
                if is_marked {
                    mark_forked_child();
                }
                num_threads().unwrap() == 1
                    && parallel_sum().unwrap() == expected
                    && with_pool(|| Ok(rayon::current_num_threads())).unwrap() == 1
                    && set_num_threads(2).is_ok()
                    && parallel_sum().unwrap() == expected
                    && in_forked_child(|| num_threads().unwrap() == 1 && parallel_sum().unwrap() == expected)
            }));
            drop(held);
        }
        // Forked on a worker thread, from inside a computation.
        assert!(with_pool(|| Ok(in_forked_child(|| parallel_sum().unwrap() == expected))).unwrap());
        assert_eq!(num_threads().unwrap(), 4);
        assert_eq!(parallel_sum().unwrap(), expected);
    }
}
