//! How many threads work: the number that a caller asks for, or one for each physical core.
//!
//! A second thread on a core shares its vector units and its way to memory, so siblings of
//! simultaneous multithreading do not count. Cores count that this process may use: those of its
//! affinity mask, and no more than its control group's quota of CPU time pays for, rounded down
//! (more threads would use the quota up before the period ends, and stand still for the rest of
//! it). `OMP_NUM_THREADS` can lower the number further.

use crate::error::{Error, Result};
use rayon::ThreadPool;
use std::num::NonZero;

/// Nobody has more cores; each thread costs memory.
const MOST_THREADS: usize = 1024;

/// `threads`, or an error unless it is 1 to 1024.
pub fn checked(threads: usize) -> Result<usize> {
    if threads == 0 || threads > MOST_THREADS {
        return Err(Error::Argument(format!("threads is {threads}, expected 1 to {MOST_THREADS}")));
    }
    Ok(threads)
}

/// The number of threads where the caller gives none, 1 to 1024.
pub fn default_threads() -> usize {
    // The standard library knows affinity masks and the quotas of both versions of control groups.
    let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
    let cores = physical_cores().unwrap_or(cpus);
    let asked = std::env::var("OMP_NUM_THREADS").ok().and_then(|text| first_count(&text));
    cpus.min(cores).min(asked.unwrap_or(MOST_THREADS)).clamp(1, MOST_THREADS)
}

/// Threads for work that belongs to no model, as a conversion: `threads`, or the number where the
/// caller gives none.
pub(crate) fn workers(threads: Option<usize>) -> Result<ThreadPool> {
    let threads = checked(threads.unwrap_or_else(default_threads))?;
    let builder = rayon::ThreadPoolBuilder::new().num_threads(threads);
    builder.build().map_err(|e| Error::Internal(format!("no threads: {e}")))
}

/// The first number of a list as "4,2", for the nested regions of OpenMP. Anything else than a
/// positive number there is ignored, as by OpenMP: the variable was set for other programs too.
fn first_count(text: &str) -> Option<usize> {
    text.split(',').next()?.trim().parse().ok().filter(|&count| count > 0)
}

/// Physical cores of this thread's affinity mask, unless the system hides them.
#[cfg(target_os = "linux")]
fn physical_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    cores_of(allowed.trim(), std::path::Path::new("/sys/devices/system/cpu"))
}

/// Physical cores of the machine: other systems have no affinity masks, or rarely use them.
#[cfg(not(target_os = "linux"))]
fn physical_cores() -> Option<usize> {
    Some(num_cpus::get_physical())
}

/// Cores with at least one CPU of a list as "0-3,8". Every CPU that is on names itself and its
/// siblings in a file below `cpus`; the list may have CPUs that are not.
#[cfg(target_os = "linux")]
fn cores_of(allowed: &str, cpus: &std::path::Path) -> Option<usize> {
    let mut cores = std::collections::HashSet::new();
    for range in allowed.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        for cpu in first.parse::<usize>().ok()?..=last.parse().ok()? {
            let siblings = cpus.join(format!("cpu{cpu}/topology/thread_siblings_list"));
            cores.extend(std::fs::read_to_string(siblings));
        }
    }
    Some(cores.len()).filter(|&count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_threads_have_bounds() {
        for threads in [1, 2, 1024] {
            assert_eq!(checked(threads).expect("a good number"), threads);
        }
        for threads in [0, 1025, usize::MAX] {
            let error = checked(threads).expect_err("a bad number").to_string();
            assert_eq!(error, format!("threads is {threads}, expected 1 to 1024"));
        }
    }

    #[test]
    fn omp_num_threads_is_a_positive_number_or_a_list() {
        for (text, count) in [("1", 1), ("4", 4), ("4,2", 4), (" 16 , 2", 16)] {
            assert_eq!(first_count(text), Some(count), "{text:?}");
        }
        for text in ["", "0", "-2", "two", ",4", "1.5", "99999999999999999999999"] {
            assert_eq!(first_count(text), None, "{text:?}");
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn siblings_count_once() {
        // Cores of two threads, numbered as servers (0 and 4) and as laptops (8 and 9) do, a core
        // of one thread (12), and a CPU that is off (13).
        let folder = tempfile::tempdir().expect("a folder");
        for (cpu, siblings) in [
            (0, "0,4"),
            (1, "1,5"),
            (2, "2,6"),
            (3, "3,7"),
            (4, "0,4"),
            (5, "1,5"),
            (6, "2,6"),
            (7, "3,7"),
            (8, "8-9"),
            (9, "8-9"),
            (12, "12"),
        ] {
            let topology = folder.path().join(format!("cpu{cpu}/topology"));
            std::fs::create_dir_all(&topology).expect("a folder");
            std::fs::write(topology.join("thread_siblings_list"), format!("{siblings}\n"))
                .expect("a file");
        }
        std::fs::create_dir(folder.path().join("cpu13")).expect("a folder");
        for (allowed, cores) in [
            ("0-7", Some(4)),
            ("0", Some(1)),
            ("0,4", Some(1)),
            ("0-3", Some(4)),
            ("3-5", Some(3)),
            ("8-9", Some(1)),
            ("8-13", Some(2)),
            ("0-8191", Some(6)),
            ("13", None),
            ("", None),
            ("some", None),
        ] {
            assert_eq!(cores_of(allowed, folder.path()), cores, "{allowed:?}");
        }
    }
}
